"""Chats through every template that TRL ships, by bytes and against TRL's own mask; what a template
would lose is refused by name."""

import json
import re

import numpy as np
import pytest
from trl.chat_template_utils import get_training_chat_template
from trl.data_utils import _tokenize

from losia_kernels.finetune.options import InputError
from losia_kernels.finetune.rows import Row
from tests.finetune import families
from tests.finetune.families import CALL, CHATS, FAMILIES, assistant, user
from tests.integrations.tiny_llama import make_tokenizer

READ = ("Qone", "Qtwo", "Sone", "rainy")  # what others say


@pytest.fixture(scope="module")
def encoders():
    """Of each family; a tokenizer takes a while."""
    made = {}

    def encoder_of(family):
        if family not in made:
            made[family] = families.encoder_of(families.tokenizer_of(family))
        return made[family]

    return encoder_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["one turn", "several turns", "tool calls", "reasoning"])
def test_what_the_assistant_says_is_learned_to_its_end_and_nothing_else(encoders, family, kind):
    encoder, chat = encoders(family), CHATS[kind]
    try:
        turns = families.learned_turns(encoder, chat)
    except InputError:
        assert kind in ("tool calls", "reasoning")
        return
    said = [message["content"] for message in chat["messages"] if message["role"] == "assistant"]
    special = [str(token) for token in encoder.tokenizer.added_tokens_decoder.values()]
    assert not [each for each in READ if each in "".join(turns)]
    answers = [turn for turn in turns if any(each and each in turn for each in said)]
    assert len(answers) == sum(each is not None for each in said)
    for turn, content in zip(answers, filter(None, said), strict=True):
        end = turn.partition(content)[2]
        assert end and not re.sub("|".join(map(re.escape, special)), "", end), end
    if kind == "tool calls":
        assert "weather" in turns[0] and "Oslo" in turns[0] and '\\"' not in turns[0]
    if kind == "reasoning":
        assert "Rone" in turns[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_trls_but_for_what_follows_the_end(encoders, family):
    """Where TRL has a training template: the same text, and no token is learned that TRL's mask has
    not; what it has more is space, and what stands after a turn's end."""
    encoder = encoders(family)
    try:
        template = get_training_chat_template(encoder.tokenizer)
    except ValueError:
        pytest.skip("TRL has no training template for it")
    for kind in ("one turn", "several turns"):
        messages = CHATS[kind]["messages"]
        if family in ("idefics3", "smolvlm", "llava_next"):  # they take lists of parts
            messages = [
                {**each, "content": [{"type": "text", "text": each["content"]}]}
                for each in messages
            ]
        theirs = _tokenize(
            encoder.tokenizer,
            messages,
            chat_template=template,
            return_assistant_tokens_mask=True,
        )
        ids, ours = encoder.encode(Row(CHATS[kind], "sample"))
        mask = np.array(theirs["assistant_masks"], bool)
        assert theirs["input_ids"][: len(ids)] == ids
        assert not (ours & ~mask[: len(ids)]).any()
        more = mask.copy()
        more[: len(ids)] &= ~ours
        rest = encoder.tokenizer.decode(np.array(theirs["input_ids"])[more])
        assert rest.replace("<eos>", "").strip() == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_message_of_weight_0_is_read_and_not_learned(encoders, family):
    messages = [user("Qone"), assistant("Aone", weight=0), user("Qtwo"), assistant("Atwo")]
    encoder = encoders(family)
    (turn,) = families.learned_turns(encoder, {"messages": messages})
    ids, _ = encoder.encode(Row({"messages": messages}, "sample"))
    assert "Atwo" in turn and "Aone" not in turn and "Aone" in encoder.tokenizer.decode(ids)
    messages = [user("Qone"), assistant("Aone"), user("Qtwo"), assistant("Atwo", weight=0)]
    (turn,) = families.learned_turns(encoder, {"messages": messages})
    assert "Aone" in turn and "Atwo" not in turn


def test_the_page_says_what_works_with_which_family():
    assert families.table() in families.PAGE.read_text(encoding="utf-8"), (
        "python -m tests.finetune.families writes the table"
    )


def chatml(tokenizer=None):
    encoder = families.encoder_of(tokenizer or make_tokenizer())
    return encoder, lambda values: families.learned_turns(encoder, values)


# other forms of a chat ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"prompt": [user("Hi")], "completion": [assistant("Yo")]},
        {"messages": [user([{"type": "text", "text": "Hi"}]), assistant("Yo")]},
        {"messages": json.loads(json.dumps([user("Hi"), assistant("Yo", weight=1)]))},
    ],
    ids=["ShareGPT", "prompt and completion", "parts", "weight 1"],
)
def test_a_chat_in_another_form_is_the_same_chat(values):
    _, learned = chatml()
    assert learned(values) == ["Yo<|end|>"]


def test_of_a_prompt_in_turns_nothing_is_learned():
    _, learned = chatml()
    prompt = [user("Hi"), assistant("Yes?"), user("2+2")]
    assert learned({"prompt": prompt, "completion": [assistant("4")]}) == ["4<|end|>"]


def test_a_system_column_comes_first():
    encoder, _ = chatml()
    ids, _ = encoder.encode(
        Row({"system": "Brief.", "messages": [user("a"), assistant("b")]}, "s:1")
    )
    assert encoder.tokenizer.decode(ids).startswith("<|system|>Brief.<|end|>\n<|user|>a")


def test_arguments_are_learned_once_encoded(encoders):
    """Servers write them as a string of JSON; a template writes an object."""
    for arguments in ('{"city": "Oslo"}', {"city": "Oslo"}):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        chat = {"messages": [user("Qone"), assistant("", tool_calls=[call])]}
        (turn,) = families.learned_turns(encoders("qwen3"), chat)
        assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in turn


def test_a_thought_within_tags_goes_where_the_template_has_thoughts(encoders):
    chat = {"messages": [user("Qone"), assistant("<think>\nRone\n</think>\n\nAone")]}
    (turn,) = families.learned_turns(encoders("gptoss"), chat)
    assert "<|channel|>analysis<|message|>Rone<|end|>" in turn and "<think>" not in turn
    (turn,) = families.learned_turns(encoders("qwen3_8"), chat)
    assert turn.count("<think>") == 1
    (turn,) = families.learned_turns(encoders("llama3"), chat)  # which has none
    assert turn == "<think>\nRone\n</think>\n\nAone<|eot_id|>"


# refused by name ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("llama3", CHATS["tool calls"], r"leaves out message 2's 'tool_calls' \('weather'\)"),
        ("llama3", CHATS["reasoning"], r"leaves out message 2's 'reasoning_content' \('Rone'\)"),
        ("deepseekv3", CHATS["tools"], r"leaves out 'tools' \('weather'\)"),
        ("gemma", CHATS["system"], "refuses this sample: System role not supported"),
        (
            "llama3",
            {"messages": [user("Yes"), assistant("Yes"), {"role": "tool", "content": ""}]},
            None,
        ),
        (
            "qwen3",
            {
                "messages": [
                    user("a"),
                    assistant("", tool_calls=[{"function": {"arguments": "{}"}}]),
                ]
            },
            "a tool call must have a function with a name",
        ),
        (
            "qwen3",
            {
                "messages": [
                    user("a"),
                    assistant("", tool_calls=[{"function": {"name": "f", "arguments": "x=1"}}]),
                ]
            },
            "the arguments of f must be an object",
        ),
        ("qwen3", {"messages": [user("a"), assistant("b", weight=0.5)]}, "'weight' is 0 or 1"),
        ("qwen3", {"messages": [user("a"), assistant("b", weight=0)]}, "has the weight 0: nothing"),
        (
            "qwen3",
            {"messages": [user([{"type": "image_url", "image_url": "x"}]), assistant("b")]},
            r"only text can be learned, got \['image_url'\]",
        ),
        (
            "qwen3",
            {"messages": [user("a"), assistant("b")], "tools": "{"},
            "'tools' is not valid JSON",
        ),
        (
            "qwen3",
            {"messages": [user("a"), {"role": "model", "content": "b"}]},
            r"no message has the role 'assistant': nothing to learn \(there are: model, user\)",
        ),
        ("qwen3", {"messages": [user("a"), assistant(None)]}, "must have 'role' and 'content'"),
        ("qwen3", {"conversations": [{"who": "a"}]}, "'conversations' must be a list of"),
    ],
)
def test_what_would_be_lost_or_is_malformed_names_the_sample(encoders, family, values, words):
    encoder = encoders(family)
    if words is None:
        assert families.learned_turns(encoder, values) == ["Yes<|eot_id|>"]
        return
    with pytest.raises(InputError, match=f"^sample: .*{words}"):
        families.learned_turns(encoder, values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"prompt": "a", "completion": "b", "system": "c"},
            "'system' beside 'prompt' would be lost",
        ),
        ({"text": "a", "tools": [CALL]}, "'tools' beside 'text' would be lost"),
        ({"instruction": "a", "input": "b", "output": "c"}, "rename 'output' to 'completion'"),
        ({"instruction": "a", "output": "c"}, "rename 'instruction' to 'prompt'"),
        ({"question": "a", "answer": "b"}, "rename 'question' to 'prompt' and 'answer'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rename 'chosen' to 'completion'"),
        ({"prompt": "a", "response": "b"}, "rename 'response' to 'completion'"),
    ],
)
def test_columns_of_other_formats_are_told_what_to_be_renamed_to(values, words):
    _, learned = chatml()
    with pytest.raises(InputError, match=f"^sample: .*{words}"):
        learned(values)


def test_a_word_that_is_dropped_is_missed_though_another_message_has_it(encoders):
    chat = {"messages": [user("Oslo"), assistant("Oslo", reasoning_content="Oslo")]}
    with pytest.raises(InputError, match="leaves out"):
        families.learned_turns(encoders("llama3"), chat)


def test_a_middle_turn_without_an_end_of_its_own_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    _, learned = chatml(tokenizer)
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    with pytest.raises(InputError, match="so message 2 would not teach where to stop"):
        learned({"messages": turns})
    turns[1]["weight"] = 0
    assert learned({"messages": turns}) == ["d<eos>"]


def test_keys_and_columns_that_nothing_reads_are_said(tmp_path):
    encoder, _ = chatml()
    rows = [Row({"messages": [user("a"), assistant("b", time=3)], "id": 7}, "d:1")]
    with pytest.warns(UserWarning) as told:
        encoder.encode_all(rows, "d")
    said = " ".join(str(each.message) for each in told)
    assert "d: of messages nothing reads 'time'" in said and "the columns 'id'" in said


@pytest.mark.parametrize("column", ["completion", "conversations", "text"])
def test_columns_named_like_a_chats_beside_messages_are_said(column):
    encoder, _ = chatml()
    row = Row({"messages": [user("a"), assistant("b")], column: [assistant("c")]}, "d:1")
    with pytest.warns(UserWarning, match=f"nothing reads the columns '{column}'"):
        encoder.encode_all([row], "d")


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma3", "cohere2"])
def test_an_end_that_the_assistant_brings_along_is_learned_once(encoders, family):
    def encoded(*answers):
        turns = [turn for answer in answers for turn in (user("a"), assistant(answer))]
        return encoders(family).encode(Row({"messages": turns}, "d:1"))

    tokenizer = encoders(family).tokenizer
    plain = encoded("b", "c d")
    end = tokenizer.decode([plain[0][-1]])
    for answers in (("b", f"c d{end}"), (f"b{end}\n", f"c d{tokenizer.eos_token}")):
        ids, taught = encoded(*answers)
        assert list(ids) == list(plain[0]) and (taught == plain[1]).all()


def test_a_call_whose_words_stand_elsewhere_is_not_taken_for_written(encoders):
    """A template that drops calls, in a chat whose tools and question hold every word of the call."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "get_weather", "description": "", "parameters": parameters}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    values = {
        "tools": [{"type": "function", "function": function}],
        "messages": [
            user("What is the weather in Paris?"),
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "get_weather", "content": "sunny"},
            assistant("It is sunny."),
        ],
    }
    with pytest.raises(InputError, match="message 2's 'tool_calls'"):
        encoders("lfm2").encode(Row(values, "d.jsonl:1"))
    turns = families.learned_turns(encoders("qwen3"), values)
    assert "get_weather" in turns[0] and "Paris" in turns[0]
