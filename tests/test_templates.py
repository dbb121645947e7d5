"""Conversations become exactly the text their template says, or a refusal."""

import pytest
from transformers import AutoTokenizer

from mm1_mlx.errors import PromptError
from mm1_mlx.prompt import encode_turns, render
from mm1_mlx.templates import MARKS
from mm1_mlx.tokenizer import load_tokenizer

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions."
)
HONEYBEE = (
    "The following is a conversation between a curious human and AI assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions."
)
FERRET = (
    "A chat between a human and an AI that understands visuals. In images, [x, y] "
    "denotes points: top-left [0, 0], bottom-right [width-1, height-1]. Increasing x "
    "moves right; y moves down. Bounding box: [x1, y1, x2, y2]. Image size: 1000x1000. "
    "Follow instructions."
)
USER3, MODEL3 = (
    f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
)
SYSTEM3 = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}"
    "{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'].strip() }}"
    "{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def decode(tokenizer, tokens):
    return tokenizer.hf.decode(list(tokens), skip_special_tokens=False)


TURNS = [("user", [None, "What?"]), ("assistant", ["A cat."]), ("user", ["Sure?"])]
TEXTS = {
    "llava": "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    "vicuna_v1": f"{VICUNA} USER: <image>\nWhat? ASSISTANT: A cat.</s>"
    "USER: Sure? ASSISTANT:",
    "honeybee": f"{HONEYBEE}\nHuman: <image>\nHuman: What?\nAI: A cat.</s>"
    "\nHuman: Sure?\nAI: ",
    "plain": "<image>What?A cat.Sure?",
    "stablelm": f"{VICUNA} USER: <image>\nWhat? ASSISTANT: A cat.<|endoftext|>"
    "USER: Sure? ASSISTANT:",
    "xgen_mm": "<image>What?A cat.<|endofchunk|>Sure?",
    "auroracap": "USER: <image>\nWhat? ASSISTANT: A cat.</s>\nUSER: Sure? ASSISTANT:",
    "ferret": f"{FERRET}  USER: <image>\nWhat? ASSISTANT: A cat.</s>"
    "USER: Sure? ASSISTANT:",
    "ferret_gemma": f"{FERRET}<start_of_turn>user\n<image>\nWhat?<end_of_turn>\n"
    "<start_of_turn>model\nA cat.<end_of_turn>\n<eos>"
    "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n",
    "ferret_llama3": f"{SYSTEM3}{FERRET}<|eot_id|>{USER3}<image>\nWhat?<|eot_id|>"
    f"{MODEL3}A cat.<|eot_id|>{USER3}Sure?<|eot_id|>{MODEL3}",
}
FIRST = {
    "llava": "USER: <image>\nWhat? ASSISTANT:",
    "vicuna_v1": f"{VICUNA} USER: <image>\nWhat? ASSISTANT:",
    "honeybee": f"{HONEYBEE}\nHuman: <image>\nHuman: What?\nAI: ",
    "plain": "<image>What?",
    "stablelm": f"{VICUNA} USER: <image>\nWhat? ASSISTANT:",
    "xgen_mm": "<image>What?",
    "auroracap": "USER: <image>\nWhat? ASSISTANT:",
    "ferret": f"{FERRET}  USER: <image>\nWhat? ASSISTANT:",
    "ferret_gemma": f"{FERRET}<start_of_turn>user\n<image>\nWhat?<end_of_turn>\n"
    "<start_of_turn>model\n",
    "ferret_llama3": f"{SYSTEM3}{FERRET}<|eot_id|>{USER3}<image>\nWhat?<|eot_id|>{MODEL3}",
}
TWO_PICTURES = {
    "llava": "USER: <image>\n<image>\nWhat? ASSISTANT:",
    "honeybee": f"{HONEYBEE}\nHuman: <image>\nHuman: <image>\nHuman: What?\nAI: ",
    "auroracap": "USER: <image> <image>\nWhat? ASSISTANT:",
}
SYSTEM = {
    "llava": "Be kind. USER: Hi ASSISTANT:",
    "vicuna_v1": "Be kind. USER: Hi ASSISTANT:",
    "honeybee": "Be kind.\nHuman: Hi\nAI: ",
    "plain": "Be kind.Hi",
    "stablelm": "Be kind. USER: Hi ASSISTANT:",
    "xgen_mm": "Be kind.Hi",
    "auroracap": f"{VICUNA} Be kind.\n USER: Hi ASSISTANT:",
    "ferret": "Be kind. USER: Hi ASSISTANT:",
    "ferret_gemma": "Be kind.<start_of_turn>user\nHi<end_of_turn>\n"
    "<start_of_turn>model\n",
    "ferret_llama3": f"{SYSTEM3}Be kind.<|eot_id|>{USER3}Hi<|eot_id|>{MODEL3}",
}


@pytest.mark.parametrize("template", TEXTS)
def test_built_in_templates_write_their_projects_text(
    template, plain_prompt, tokenizer
):
    config = plain_prompt(template=template)
    assert render(TURNS[:1], config, tokenizer) == FIRST[template]
    assert render(TURNS, config, tokenizer) == TEXTS[template]
    system = [("system", ["Be kind."]), ("user", ["Hi"])]
    assert render(system, config, tokenizer) == SYSTEM[template]


@pytest.mark.parametrize("template", TWO_PICTURES)
def test_several_pictures_stand_as_their_project_has_them(
    template, plain_prompt, tokenizer
):
    turns = [("user", [None, None, "What?"])]
    config = plain_prompt(template=template)
    assert render(turns, config, tokenizer) == TWO_PICTURES[template]


@pytest.mark.parametrize("template", TEXTS)
def test_an_answer_begins_where_the_prompt_ends(template, plain_prompt, tokenizer):
    config = plain_prompt(template=template)
    asked = render(TURNS[:1], config, tokenizer)
    answered = render(TURNS[:2], config, tokenizer, answer=False)
    assert answered.startswith(asked)
    ends = ["</s>", "<|endoftext|>", "<|endofchunk|>", ""]
    ends += ["<end_of_turn>\n<eos>", "<|eot_id|>"]
    assert answered[len(asked) :].strip() in [f"A cat.{end}" for end in ends]


@pytest.fixture
def with_template(any_tokenizer, plain_prompt):
    """A function: the config for a checkpoint's own template, now the tokenizer's."""

    def with_template(template, content="string"):
        any_tokenizer.hf.chat_template = template
        return plain_prompt(template="checkpoint", content=content)

    return with_template


def test_a_checkpoints_template_takes_strings(with_template, any_tokenizer):
    config = with_template(CHATML)
    expected = "[user]<image>What?</s>[assistant]A cat.</s>[user]Sure?</s>[assistant]"
    assert render(TURNS, config, any_tokenizer) == expected


def test_a_checkpoints_template_takes_typed_parts(with_template, any_tokenizer):
    config = with_template(PARTS, "parts")
    turns = [("user", [" What", None, "? "])]
    assert render(turns, config, any_tokenizer) == "USER: <image>\nWhat? ASSISTANT:"


@pytest.mark.parametrize("content", ["string", "parts"])
def test_typed_specials_pass_through_a_checkpoints_template(
    content, with_template, any_tokenizer
):
    config = with_template(PARTS if content == "parts" else CHATML, content)
    tokens = encode_turns([("user", ["</s> <image> x </s>"])], config, any_tokenizer)
    assert any_tokenizer.image_id not in tokens
    ends = tokens.count(any_tokenizer.hf.eos_token_id)
    assert ends == (content == "string")
    assert "</s> <image> x </s>" in decode(any_tokenizer, tokens)


PLAIN_TURNS = [
    [("user", ["Is it red?"])],
    [
        ("system", ["Be kind."]),
        ("user", ["a"]),
        ("assistant", ["b"]),
        ("user", [" c "]),
    ],
    [("user", ["ünïcödé ☃\n\nlines"])],
]


@pytest.mark.parametrize("turns", PLAIN_TURNS)
def test_tokens_equal_transformers_chat_template(
    turns, with_template, any_folder, any_tokenizer
):
    config = with_template(CHATML)
    reference = AutoTokenizer.from_pretrained(any_folder)
    messages = [{"role": role, "content": parts[0]} for role, parts in turns]
    expected = reference.apply_chat_template(
        messages,
        chat_template=CHATML,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert encode_turns(turns, config, any_tokenizer) == expected


@pytest.mark.parametrize("template", [name for name in TEXTS if name not in MARKS])
def test_built_in_tokens_equal_transformers_on_the_same_text(
    template, plain_prompt, any_folder, any_tokenizer
):
    reference = AutoTokenizer.from_pretrained(any_folder)
    reference.add_tokens(["<image>"], special_tokens=True)
    config = plain_prompt(template=template)
    expected = reference.encode(render(TURNS, config, any_tokenizer))
    assert encode_turns(TURNS, config, any_tokenizer) == expected


@pytest.mark.parametrize("template", ["auroracap", "ferret", "ferret_gemma"])
def test_some_texts_are_encoded_apart_at_their_pictures(
    template, plain_prompt, any_folder, any_tokenizer
):
    reference = AutoTokenizer.from_pretrained(any_folder)
    config = plain_prompt(template=template)
    turns = [("user", [None, None, "What is it?"])]
    before, between, after = render(turns, config, any_tokenizer).split("<image>")
    image = [any_tokenizer.image_id]
    expected = reference.encode(before) + image
    expected += reference.encode(between, add_special_tokens=False) + image
    expected += reference.encode(after, add_special_tokens=False)
    assert encode_turns(turns, config, any_tokenizer) == expected


def test_the_beginning_token_comes_once(spm_folder, plain_prompt):
    tokenizer = load_tokenizer(spm_folder, plain_prompt())
    turns, bos = [("user", ["red"])], tokenizer.hf.bos_token_id
    assert encode_turns(turns, plain_prompt(), tokenizer).count(bos) == 1
    tokenizer.hf.chat_template = "<s>" + PARTS
    config = plain_prompt(template="checkpoint", content="parts")
    tokens = encode_turns(turns, config, tokenizer)
    assert tokens[0] == bos
    assert tokens.count(bos) == 1


FAULTS = [
    "{{ raise_exception('no system messages\nhere') }}",
    "{{ 1 + messages[0]['content'] }}",
    "{{ 1 // 0 }}",
    "{{ nothing.at.all }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% if %}",
    "{{ messages[7]['content'] }}",
    "{{ messages[0] | nonsense }}",
    "{{ 'x'.encode('nonsense') }}",
    "{{ [].index(3) }}",
]


@pytest.mark.parametrize("template", FAULTS)
def test_a_template_that_fails_is_a_refusal_of_one_line(
    template, with_template, any_tokenizer
):
    config = with_template(template)
    with pytest.raises(
        PromptError, match="the model's chat template refuses this conversation: "
    ) as caught:
        render([("user", ["a"])], config, any_tokenizer)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_template_is_named(with_template, any_tokenizer):
    config = with_template(None)
    with pytest.raises(PromptError, match="the model's tokenizer has no chat template"):
        render([("user", ["a"])], config, any_tokenizer)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'][1] }}",
    "{{ (''|attr('__class__')).mro() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ joiner.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ namespace.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ lipsum.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ strftime_now.__globals__['datetime'].sys.modules }}",
    "{{ range.__class__.__base__.__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages.append('x') }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages[0].pop('content') }}",
    "{{ messages.clear() }}",
    "{{ ''.format.__func__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{% set x = ''.__class__ %}{{ x.__base__.__subclasses__()[0] }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(
    template, with_template, any_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = with_template(template)
    with pytest.raises(PromptError, match="refuses this conversation"):
        render([("user", ["a"])], config, any_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_honeybee_s_stretches_are_tokenised_by_themselves(any_tokenizer, plain_prompt):
    stretches = [
        *(HONEYBEE, "\nHuman: ", "<image>", "\nHuman: ", "What?", "\nAI: ", "A cat."),
        *("</s>", "\nHuman: ", "Sure?", "\nAI: "),
    ]
    hf = any_tokenizer.hf
    expected = [] if hf.bos_token_id is None else [hf.bos_token_id]
    for stretch in stretches:
        expected += hf.encode(stretch, add_special_tokens=False)
    tokens = encode_turns(TURNS, plain_prompt(template="honeybee"), any_tokenizer)
    assert tokens == expected
    assert tokens.count(any_tokenizer.image_id) == 1
    if hf.bos_token_id is not None:
        # SentencePiece's own space, before "What?" for example, is there.
        whole = hf.encode("".join(stretches), add_special_tokens=False)
        assert len(tokens) > len(whole) + 1
