"""What a record says is found in its tokens, or its loss is said: one table a kind of record."""

from __future__ import annotations

import datetime
import json
import re
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataflex.config import RunConfig
from dataflex.data.catalog import DIRECT_LAYOUTS, recognise
from dataflex.data.chat_template import encode_chat_turns
from dataflex.data.completeness import find_missing
from dataflex.data.conversations import Conversation, Message, Unusable, to_conversation
from dataflex.data.encoding import Encoded
from dataflex.data.examples import load_split, row_encoder
from dataflex.data.preprocess import encode_record
from dataflex.data.records import Source, Tags, read_records
from dataflex.data.subset import subset_records
from dataflex.data.template_table import TEMPLATES
from dataflex.data.templates import Thinking
from dataflex.files import write_jsonl

ASK = {"role": "user", "content": "Where is Oslo?"}
SAY = {"role": "assistant", "content": "In Norway."}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"place": "Oslo"}'}}
CALLS = '[{"name": "find", "arguments": {"place": "Oslo"}}]'


def source_of(record: dict, formatting: str | None = None) -> Source:
    source = recognise("d", Path("d.jsonl"), record)
    return source if formatting is None else Source("d", Path("d.jsonl"), formatting, source.columns, source.tags)


def turns_of(record: dict) -> list[tuple[str, str]]:
    conversation = to_conversation(source_of(record), record)
    system = [("system", conversation.system)] if conversation.system else []
    return system + [(message.role, message.content) for message in conversation.messages]


def chat(*turns: dict, **more: object) -> dict:
    return {"messages": list(turns), **more}


# Records in the layouts that are met, and the turns that they hold.
READ = {
    "reasoning_content is the thought": (
        chat(ASK, {**SAY, "reasoning_content": "Think of maps."}),
        [("user", "Where is Oslo?"), ("assistant", "<think>\nThink of maps.\n</think>\n\nIn Norway.")],
    ),
    "a thought that is in the content too is said once": (
        chat(ASK, {"role": "assistant", "content": "<think>\nMaps.\n</think>\n\nYes.", "reasoning_content": "Maps."}),
        [("user", "Where is Oslo?"), ("assistant", "<think>\nMaps.\n</think>\n\nYes.")],
    ),
    "a thought and no content": (
        chat(ASK, {"role": "assistant", "content": None, "reasoning": "Maps."}),
        [("user", "Where is Oslo?"), ("assistant", "<think>\nMaps.\n</think>\n\n")],
    ),
    "a text beside a call": (
        chat(ASK, {"role": "assistant", "content": "I will look.", "tool_calls": [CALL]}),
        [("user", "Where is Oslo?"), ("function", f"I will look.\n<tool_call>\n{CALLS}\n</tool_call>")],
    ),
    "a thought beside a call": (
        chat(ASK, {"role": "assistant", "content": None, "reasoning_content": "Maps.", "tool_calls": [CALL]}),
        [("user", "Where is Oslo?"), ("function", f"<think>\nMaps.\n</think>\n\n{CALLS}")],
    ),
    "a call without arguments, a null result": (
        chat(
            ASK,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            {"role": "tool", "content": None},
            SAY,
        ),
        [
            ("user", "Where is Oslo?"),
            ("function", '[{"name": "f", "arguments": {}}]'),
            ("observation", ""),
            ("assistant", "In Norway."),
        ],
    ),
    "the old function_call and its function turn": (
        chat(
            ASK,
            {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": '{"place": "Oslo"}'}},
            {"role": "function", "name": "find", "content": "north"},
            SAY,
        ),
        [("user", "Where is Oslo?"), ("function", CALLS), ("observation", "north"), ("assistant", "In Norway.")],
    ),
    "text parts are joined": (
        chat(
            {"role": "user", "content": [{"type": "text", "text": "Where"}, {"type": "text", "text": "is it?"}]},
            {"role": "assistant", "content": ["Here."]},
        ),
        [("user", "Where\nis it?"), ("assistant", "Here.")],
    ),
    "text parts of a tool's result": (
        chat(ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": [{"text": "x"}]}, SAY),
        [("user", "Where is Oslo?"), ("function", CALLS), ("observation", "x"), ("assistant", "In Norway.")],
    ),
    "developer is system": (
        chat({"role": "developer", "content": "Be brief."}, ASK, SAY),
        [("system", "Be brief."), ("user", "Where is Oslo?"), ("assistant", "In Norway.")],
    ),
    "conversations with role and content": (
        {"conversations": [ASK, SAY]},
        [("user", "Where is Oslo?"), ("assistant", "In Norway.")],
    ),
    "conversations of role and content with a call": (
        {"conversations": [{"role": "system", "content": "s"}, ASK, {"role": "assistant", "tool_calls": [CALL]}]},
        [("system", "s"), ("user", "Where is Oslo?"), ("function", CALLS)],
    ),
    "messages with from and value": (
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
    "OpenAI's names under ShareGPT's keys": (
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_records_that_are_read(name: str) -> None:
    record, expected = READ[name]
    assert turns_of(record) == expected
    assert to_conversation(source_of(record), record).left_out == ()


# Records that cannot be read, and the reason: the turn, its role, what is wrong and the way out.
DROPPED = {
    "a system turn in the middle": (
        chat(ASK, {"role": "system", "content": "Be brief."}, SAY),
        "turn 2 (system): a system turn is not the first; move its text into the first turn or the system column",
    ),
    "the same in ShareGPT's layout": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "system", "value": "c"},
                {"from": "human", "value": "d"},
            ]
        },
        "turn 3 (system): a system turn is not the first; move its text into the first turn or the system column",
    ),
    "two system turns": (
        chat({"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, ASK, SAY),
        "turn 2 (developer): a system turn is not the first; move its text into the first turn or the system column",
    ),
    "null content": (
        chat(ASK, {"role": "assistant", "content": None}),
        "turn 2 (assistant): content is null, not a text; write it as one",
    ),
    "content that is an object": (
        chat({"role": "user", "content": {"a": 1}}, SAY),
        "turn 1 (user): content is dict, not a text; write it as one",
    ),
    "an image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAY),
        "turn 1 (user): content has a part of type image_url; only texts can be read",
    ),
    "two thoughts": (
        chat(ASK, {"role": "assistant", "content": "<think>\na\n</think>\n\nb", "reasoning_content": "other"}),
        "turn 2 (assistant): two thoughts, in content and in a key of its own; take one out",
    ),
    "a call of nothing": (
        chat(ASK, {"role": "assistant", "tool_calls": [{"type": "function", "function": None}]}),
        "turn 2 (assistant): a tool call names no function; each is {'function': {'name': …, 'arguments': …}}",
    ),
    "one side twice": (
        chat(ASK, SAY, SAY, ASK),
        "turn 3 (assistant): roles do not alternate (a prompt is expected here; "
        "join turns of one side, or take one out)",
    ),
    "an unknown role": (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        "turn 1 (narrator): roles do not alternate (unknown role; expected user, human, assistant, gpt, model, tool, "
        "observation, function, function_call, system, developer)",
    ),
    "no answer": (chat(ASK, SAY, ASK), "no response (the last is turn 3 (user))"),
    "no role": (
        {"conversations": [{"speaker": "a", "text": "b"}]},
        "turn 1 of conversations has no from; say there whose turn it is",
    ),
    "a turn that is a text": (chat("a"), "turn 1 of messages is str, not an object with a role"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_records_that_are_dropped_say_why(name: str) -> None:
    record, reason = DROPPED[name]
    with pytest.raises(Unusable, match=f"^{re.escape(reason)}$"):
        to_conversation(source_of(record), record)


# Records that are read but for a field, and how that is said.
LEFT_OUT = {
    "a field of a turn": (chat(ASK, {**SAY, "note": "Check it."}), "field 'note' of assistant turns"),
    "a weight of a turn": (chat(ASK, {**SAY, "weight": 0}), "field 'weight' of assistant turns"),
    "a thought of the user": (chat({**ASK, "reasoning": "Hm."}, SAY), "field 'reasoning' of user turns"),
    "calls in ShareGPT's layout": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "tool_calls": [CALL]}]},
        "field 'tool_calls' of assistant turns",
    ),
    "a field of the record": (chat(ASK, SAY, context="Norway lies north."), "column 'context'"),
    "a list in the record": (chat(ASK, SAY, documents=["x"]), "column 'documents'"),
    "tools of an alpaca record": (
        {"instruction": "a", "output": "b", "tools": [{"name": "f"}]},
        "column 'tools'",
    ),
    "a system column beside a system turn": (
        chat({"role": "system", "content": "a"}, ASK, SAY, system="b"),
        "the system column, beside a system turn",
    ),
    "results at the end": (
        chat(ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "x"}),
        "tool results that no turn answers",
    ),
}
WHOLE = {
    "links and labels": chat({**ASK, "id": 3}, {**SAY, "tool_call_id": "x"}, id="a1", source="web", score=3.5),
    "what is empty": chat({**ASK, "note": None, "more": ""}, {**SAY, "tool_calls": []}, context="", documents=[]),
    "the project's own fields": chat(ASK, SAY, subtask="two words", dataflex={"row": 1, "score": 0.5}),
    "the function's name beside its result": chat(
        ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "x", "name": "find"}, SAY
    ),
}


@pytest.mark.parametrize("name", [*LEFT_OUT, *WHOLE])
def test_fields_that_are_not_read_are_said(name: str) -> None:
    record, said = LEFT_OUT[name] if name in LEFT_OUT else (WHOLE[name], None)
    conversation = to_conversation(source_of(record), record)
    assert conversation.left_out == (() if said is None else (said,))


def test_what_is_not_read_is_said_once_with_a_count(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(chat(ASK, {**SAY, "note": note})) + "\n" for note in (None, "x", "y")))
    for _ in range(2):  # also where the rows come from the cache
        with pytest.warns(UserWarning, match="not read: field 'note' of assistant turns, in 2 of 3 rows .first: row 1"):
            load_split(RunConfig(dataset=[str(path)], template="smollm2"), tokenizer)


def test_entries_keep_the_roles_that_their_tags_name() -> None:
    tags = Tags("role", "content", "user", "assistant", None, "function", "system")
    columns = DIRECT_LAYOUTS["messages"][1]
    source = Source("d", None, "openai", columns, tags)
    call = {"role": "function", "content": '{"name": "f", "arguments": {}}'}
    assert to_conversation(source, chat(ASK, call)).messages[1].role == "function"  # not a result, as elsewhere
    with pytest.raises(Unusable, match=r"turn 1 .human.: roles do not alternate .unknown role"):
        to_conversation(source, chat({"role": "human", "content": "a"}, SAY))
    assert to_conversation(source, chat({"role": "developer", "content": "s"}, ASK, SAY)).system.startswith("s")


TEXT = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="<>"), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def encoders(_loaded_tokenizer):
    import copy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: (encoded := copy.deepcopy(_loaded_tokenizer), row_encoder(RunConfig(template=name), encoded))
            for name in [None, *TEMPLATES]
        }


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(system=TEXT, texts=st.lists(TEXT, min_size=4, max_size=4), thought=TEXT, beside=TEXT)
def test_every_text_is_in_the_tokens_of_every_template(
    encoders, template: str | None, system: str, texts: list[str], thought: str, beside: str
) -> None:
    tokenizer, encode = encoders[template]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)]
    turns[1]["reasoning_content"] = thought
    record = chat({"role": "system", "content": system}, *turns)
    called = chat(ASK, {"role": "assistant", "content": beside, "tool_calls": [CALL]})
    for said, made in (([system, thought, *texts], record), ([beside, "find", "Oslo"], called)):
        try:
            encoded: Encoded = encode(to_conversation(source_of(made), made))
        except Unusable as reason:
            assert made is called and TEMPLATES[template].system_in_user
            assert str(reason).startswith("turn 2 (assistant): the template cannot say the text beside a function call")
            continue
        decoded = "".join(tokenizer.decode(encoded.input_ids).split())
        assert all("".join(text.split()) in decoded for text in said)
        assert encoded.lost == ()


# Chat templates that leave something out, a conversation each that has it, and what is said.
def worded(said: str, turns: str = "messages") -> str:
    """A chat template that says `said` of each of `turns`."""
    return (
        "{% for m in " + turns + " %}<|im_start|>{{ m.role }}\n" + said + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


NO_SYSTEM = worded("{{ m.content }}", "messages if m.role != 'system'")
THOUGHTFUL = [Message("user", "a?"), Message("assistant", "<think>\nMaps are flat.\n</think>\n\nb.")]
TWICE = [*THOUGHTFUL, Message("user", "c?"), Message("assistant", "d.")]
CALLING = [Message("user", "a?"), Message("function", CALLS), Message("observation", '"x"'), Message("assistant", "b.")]
TOOLS = '[{"name": "find"}]'
LOSSES = {
    "keeps all": (worded("{{ m.content | trim }}"), Conversation(TWICE, "Be brief."), ()),
    "cuts every thought": (worded("{{ m.content.split('</think>')[-1] | trim }}"), Conversation(TWICE), ("thoughts",)),
    "cuts the thoughts of earlier turns": (
        worded("{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}"),
        Conversation(TWICE),
        ("thoughts",),
    ),
    "ignores system turns": (
        NO_SYSTEM,
        Conversation(THOUGHTFUL, "Be brief."),
        ("the system text",),
    ),
    "ignores a system text that the user says too": (
        NO_SYSTEM,
        Conversation(THOUGHTFUL, "a?"),
        ("the system text",),
    ),
    "cuts long turns": (
        worded("{{ m.content[:8] }}"),
        Conversation([Message("user", "A question that is long"), Message("assistant", "b.")]),
        ("the text of user turns",),
    ),
    "says all calls": (
        "{{ tools | tojson }}" + worded("{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"),
        Conversation(CALLING, tools=TOOLS),
        (),
    ),
    "ignores tools and the arguments of calls": (
        worded("{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"),
        Conversation(CALLING, tools='[{"name": "other"}]'),
        ("the tools on offer", "function calls"),
    ),
    "words results as JSON": (
        worded(
            "{{ m.content | tojson if m.role == 'tool' else m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
        ),
        Conversation(CALLING),
        (),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_chat_template_leaves_out_is_said(tokenizer, name: str) -> None:
    tokenizer.chat_template, conversation, lost = LOSSES[name]
    encoded = row_encoder(RunConfig(), tokenizer)(conversation)
    assert (encoded.lost, encoded.left_out) == (lost, ())


def test_a_text_beside_a_call_that_a_chat_template_leaves_out_drops_the_row(tokenizer) -> None:
    tokenizer.chat_template = worded("{{ m.tool_calls[0].function | tojson if m.tool_calls else m.content }}")
    beside = chat(ASK, {"role": "assistant", "content": "I will look.", "tool_calls": [CALL]})
    source = source_of(beside)
    encode = row_encoder(RunConfig(), tokenizer)
    outcome = encode_record([source], encode, (0, 0, beside))
    assert outcome.reason.startswith("turn 2 (assistant): the template cannot say the text beside a function call")
    del beside["messages"][1]["content"]
    assert encode_record([source], encode, (0, 0, beside)).reason is None


def test_a_character_that_the_tokenizer_does_not_know_is_said(tokenizer) -> None:
    conversation = Conversation([Message("user", "Hi é"), Message("assistant", "b")])
    turns = encode_chat_turns(tokenizer, conversation, True, datetime.date(2026, 1, 2))
    assert find_missing(tokenizer, conversation, turns, Thinking()).lost == ()
    unknown = [
        ([token for token in prompt if "é" not in tokenizer.decode([token])], answer) for prompt, answer in turns
    ]
    assert find_missing(tokenizer, conversation, unknown, Thinking()).lost == ("the text of user turns",)


@pytest.mark.parametrize(
    ("keys", "left_out"),
    [
        ({}, ()),
        ({"enable_thinking": False}, ("thoughts, which enable_thinking or mask_history takes out",)),
        ({"mask_history": True}, ("thoughts, which enable_thinking or mask_history takes out",)),
        ({"mask_history": True, "preserve_thinking": True}, ()),
    ],
)
def test_thoughts_that_the_config_takes_out_are_not_called_lost(tokenizer, keys: dict, left_out: tuple) -> None:
    encoded = row_encoder(RunConfig(template="qwen3", **keys), tokenizer)(Conversation(TWICE))
    assert (encoded.lost, encoded.left_out) == ((), left_out)


def test_rows_that_lose_text_are_counted(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "d.jsonl"
    system = {"role": "system", "content": "Answer in one word."}
    path.write_text("".join(json.dumps(chat(*turns)) + "\n" for turns in ([ASK, SAY], [system, ASK, SAY])))
    tokenizer.chat_template = LOSSES["ignores system turns"][0]
    config = RunConfig(dataset=[str(path)])
    for _ in range(2):  # also where the rows come from the cache
        with pytest.warns(
            UserWarning, match=r"the system text cannot be found in the tokens of 1 of 2 rows .first: row 1"
        ):
            report = load_split(config, tokenizer).report
    assert report.lost == {"the system text": [1]}
    assert report.problems() == ["row 1: the system text cannot be found in the tokens (1 rows so)"]


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {}}}}
NULLED = [
    chat(ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "x"}, SAY),
    chat(
        ASK,
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": {"c": 3}}}}]},
        tools=[
            {**TOOL, "function": {**TOOL["function"], "parameters": {"properties": {"a": {"type": "integer"}}}}},
            {**TOOL, "function": {**TOOL["function"], "parameters": {"properties": {"b": {"enum": ["x"]}}}}},
        ],
    ),
    chat(ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "neg", "arguments": {"b": {"d": [1.5]}}}}]}),
    chat({"role": "system", "content": "s"}, {**ASK, "name": "Ann"}, {**SAY, "reasoning_content": "t"}, subtask="n"),
]
NULLED[0]["messages"][1]["tool_calls"] = [{"function": {"name": "find", "arguments": {"place": "Oslo"}}}]


@pytest.mark.parametrize("template", ["qwen3", "llama3", "default", "mistral", None])
def test_arrow_and_json_lines_give_the_same_tokens(tmp_path: Path, tokenizer, template: str | None) -> None:
    import pyarrow
    import pyarrow.parquet

    write_jsonl(tmp_path / "rows.jsonl", NULLED)
    table = pyarrow.Table.from_pylist([dict.fromkeys(["messages", "tools", "subtask"]) | row for row in NULLED])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    found = {}
    for kind in ("jsonl", "parquet", "arrow"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            split = load_split(RunConfig(dataset=[str(tmp_path / f"rows.{kind}")], template=template), tokenizer)
        found[kind] = [(e.row, e.input_ids, e.labels, e.subtask) for e in split.examples], split.report
    assert len(found["jsonl"][0]) >= 3
    assert found["parquet"] == found["arrow"] == found["jsonl"]


def test_a_subset_of_what_json_cannot_hold_reads_back(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"instruction": "a", "output": "b", "day": datetime.date(2026, 1, 2), "raw": b"\x00", "n": float("nan")}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = recognise("rows", tmp_path / "rows.parquet", rows[0])
    write_jsonl(tmp_path / "subset.jsonl", subset_records([(source, *read_records(source))], [0]))
    (record,) = read_records(Source("subset", tmp_path / "subset.jsonl"))
    assert record == {"instruction": "a", "output": "b", "day": "2026-01-02", "raw": "AA==", "n": None}


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b"])
def test_half_a_surrogate_pair_drops_its_row_and_crashes_nothing(tmp_path: Path, tokenizer, text: str) -> None:
    good = {"instruction": "a", "output": "b", "subtask": text}
    records = [good, {"instruction": text, "output": "b"}, chat({"role": text, "content": "x"}), {**good, text: text}]
    write_jsonl(tmp_path / "rows.jsonl", records)
    source = recognise("rows", tmp_path / "rows.jsonl", good)
    assert read_records(source) == records
    write_jsonl(tmp_path / "again.jsonl", subset_records([(source, records[row]) for row in (3, 0, 1)], [3, 0, 1]))
    split = load_split(RunConfig(dataset=[str(tmp_path / "rows.jsonl")], template="smollm2"), tokenizer)
    assert [example.row for example in split.examples] == [0, 3]
    assert list(split.report.dropped) == [
        "malformed record (a text is not valid Unicode: it has half of a surrogate pair; write the character whole)",
        "no response",
    ]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "type", "function", "arguments", "parameters", "text", "a"]), values)
    ),
    max_leaves=6,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", "function_call"]) | ANY},
        optional={
            key: st.just("x") | ANY for key in ("content", "tool_calls", "function_call", "reasoning_content", "name")
        },
    ),
    max_size=4,
)


@pytest.mark.parametrize("template", [None, "qwen3", "llama3", "default", "mistral", "glm4"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=TURNS | ANY, tools=ANY, system=st.just("s") | ANY, spare=ANY)
def test_any_record_gives_a_row_or_a_reason(encoders, template: str | None, turns, tools, system, spare) -> None:
    record = {"messages": turns, "tools": tools, "system": system, "spare": spare}
    _, encode = encoders[template]
    outcome = encode_record([source_of(record)], encode, (0, 0, record))
    assert (outcome.reason is None) == bool(outcome.input_ids)
    assert all(text.isprintable() for text in (outcome.reason or "", *outcome.lost, *outcome.left_out))


def test_a_record_that_is_nested_too_deeply_drops_its_row(encoders) -> None:
    deep: object = "x"
    for _ in range(2000):
        deep = [deep]
    _, encode = encoders["qwen3"]
    calling = chat(ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": deep}}}]})
    for record in (chat(ASK, SAY, tools=[{"name": "f", "parameters": deep}]), calling):
        assert "nested too deeply" in encode_record([source_of(record)], encode, (0, 0, record)).reason
