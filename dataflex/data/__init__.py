"""Records → conversations → token rows with masks → batches by token budget.

records.py     files → records                    catalog.py    names → Sources
conversations.py  records → turns                 tools.py      how templates word tools and calls
templates.py   turns → token ids, by name         chat_template.py  the same by the tokenizer's own template
encoding.py    token turns → ids and labels       examples.py   a config → Examples and a report
batches.py     Examples → batches, tensors        subset.py     chosen rows → records to write
"""
