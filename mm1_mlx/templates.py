"""Chat templates (Jinja) of public checkpoints whose tokenizers bring none."""

_TURNS = (
    "{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{ m.content + ' ' }}"
    "{%- elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{%- else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HONEYBEE_SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions."
)
_FERRET_SYSTEM = (
    "A chat between a human and an AI that understands visuals. In images, [x, y] "
    "denotes points: top-left [0, 0], bottom-right [width-1, height-1]. Increasing x "
    "moves right; y moves down. Bounding box: [x1, y1, x2, y2]. Image size: 1000x1000. "
    "Follow instructions."
)
TEMPLATES = {
    # llava-hf/llava-1.5-7b-hf: no system prompt.
    "llava": _TURNS,
    # LLaVA, conversation.py, conv_vicuna_v1.
    "vicuna_v1": "{%- if messages[0].role != 'system' %}{{ '"
    + _VICUNA_SYSTEM.replace("'", "\\'")
    + " ' }}{% endif %}"
    + _TURNS,
    # Honeybee, pipeline/interface.py.
    "honeybee": "{%- if messages[0].role != 'system' %}{{ '"
    + _HONEYBEE_SYSTEM.replace("'", "\\'")
    + "' }}{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{ m.content }}"
    "{%- elif m.role == 'user' %}{{ '\nHuman: ' + m.content }}"
    "{%- else %}{{ '\nAI: ' + m.content + eos_token }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '\nAI: ' }}{% endif %}",
    # LLaVA, conversation.py, conv_mistral_instruct.
    "mistral": "{%- set ns = namespace(system='') %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'system' %}"
    "{%- set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{%- elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}"
    "{%- set ns.system = '' %}"
    "{%- else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}"
    "{%- endfor %}",
    # MoE-LLaVA, conversation.py, conv_stablelm: Vicuna's, but for the end.
    "stablelm": "{%- if messages[0].role != 'system' %}{{ '"
    + _VICUNA_SYSTEM.replace("'", "\\'")
    + " ' }}{% endif %}"
    + _TURNS.replace("eos_token", "'<|endoftext|>'"),
    # AuroraCap, xtuner/utils/templates.py, vicuna: no system prompt unless one is given.
    "auroracap": "{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{ '"
    + _VICUNA_SYSTEM.replace("'", "\\'")
    + " ' + m.content + '\n ' }}"
    "{%- elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT:' }}"
    "{%- else %}{{ ' ' + m.content + eos_token + '\n' }}{% endif %}"
    "{%- endfor %}",
    # xGen-MM's base models: a solved example ends with a token of its own.
    "xgen_mm": "{%- for m in messages %}{{ m.content }}"
    "{%- if m.role == 'assistant' %}{{ '<|endofchunk|>' }}{% endif %}{% endfor %}",
    # Ferret, ferret/conversation.py, ferret_conv_vicuna_v1: its system prompt ends with
    # a space, and another one separates it.
    "ferret": "{%- if messages[0].role != 'system' %}{{ '"
    + _FERRET_SYSTEM
    + "  ' }}{% endif %}"
    + _TURNS,
    # Ferret-UI, ferretui/conversation.py, conv_ferret_gemma_instruct.
    "ferret_gemma": "{%- if messages[0].role != 'system' %}{{ '"
    + _FERRET_SYSTEM
    + "' }}{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{ m.content }}"
    "{%- elif m.role == 'user' %}"
    "{{ '<start_of_turn>user\n' + m.content + '<end_of_turn>\n' }}"
    "{%- else %}"
    "{{ '<start_of_turn>model\n' + m.content + '<end_of_turn>\n<eos>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # Ferret-UI, conv_ferret_llama_3. It writes a begin token, and the tokenizer puts
    # another one before it; the weights learned with both.
    "ferret_llama3": "{%- set system = '"
    + _FERRET_SYSTEM
    + "' if messages[0].role != 'system' else messages[0].content %}"
    "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n' + system "
    "+ '<|eot_id|>' }}"
    "{%- for m in messages if m.role != 'system' %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content "
    "+ '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # A base model: the contents and nothing else.
    "plain": "{%- for m in messages %}{{ m.content }}{% endfor %}",
}
# Where a template's project cuts its text, pictures aside, to tokenise every stretch by
# itself: Llama's tokenizer begins each with a space of its own.
MARKS = {
    # Honeybee, honeybee/tokenization_honeybee.py.
    "honeybee": ("\nAI: ", "\nHuman: "),
    # AuroraCap, inference.py: at pictures alone.
    "auroracap": (),
    # Ferret and Ferret-UI, mm_utils.py, tokenizer_image_token: at pictures alone.
    "ferret": (),
    "ferret_gemma": (),
    "ferret_llama3": (),
}
# What a built-in template writes between a picture and the text after it.
AFTER_IMAGE = {
    "llava": "\n",
    "vicuna_v1": "\n",
    "honeybee": "\nHuman: ",
    "mistral": "\n",
    "stablelm": "\n",
    "auroracap": "\n",
    "ferret": "\n",
    "ferret_gemma": "\n",
    "ferret_llama3": "\n",
}
# What it writes between two pictures instead, where that is something else.
BETWEEN_IMAGES = {
    "auroracap": " ",
}
