"""Records → conversations → token rows with masks → batches by token budget.

catalog.py     names → Sources                    records.py     Sources → records, one by one
hub.py         datasets of the Hugging Face hub   completeness.py  what the tokens do not say
conversations.py  records → turns                 tools.py       how templates word tools and calls
template_table.py  the templates, as data         templates.py   turns → token ids by one of them
chat_template.py  the same by the tokenizer's own template
encoding.py    token turns → ids and labels       preprocess.py  records → rows, in several processes
rows.py        rows on disk → Examples            row_cache.py   which file holds which rows
examples.py    a config → Examples and a report   report.py      what became of the rows, in numbers
preview.py     a split as a person checks it      batches.py     Examples → batches, tensors
subset.py      chosen rows → records to write     chat_formats.py  a template in other programs' words
"""
