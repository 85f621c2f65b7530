"""Where a chat template comes from: the packed file, a path, or a built-in name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from nf4format.files import read_file

from ..errors import TrainError

_MAX_BYTES: Final = 4 << 20

# All mark what the assistant writes, its end token included. bos_token is empty where the model has none.
BUILT_IN: Final[dict[str, str]] = {
    "chatml": """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "llama3": """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "mistral": """\
{%- set ns = namespace(system='') %}
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set ns.system = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'assistant' %}
{%- generation %}{{- ' ' + message['content'] | trim + eos_token }}{%- endgeneration %}
{%- else %}
{{- '[INST] ' + ns.system + message['content'] + ' [/INST]' }}
{%- set ns.system = '' %}
{%- endif %}
{%- endfor %}""",
    "qwen": """\
{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "gemma": """\
{%- set ns = namespace(system='') %}
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set ns.system = message['content'] + '\\n\\n' %}
{%- elif message['role'] == 'assistant' %}
{{- '<start_of_turn>model\\n' }}
{%- generation %}{{- message['content'] | trim + '<end_of_turn>' }}{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- '<start_of_turn>user\\n' + ns.system + message['content'] | trim + '<end_of_turn>\\n' }}
{%- set ns.system = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}""",
    # For base models without tokens of their own for turns: the end token is the only special one.
    "plain": """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '### Assistant:\\n' }}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
{{- '\\n' }}
{%- elif message['role'] == 'system' %}
{{- '### System:\\n' + message['content'] + '\\n' }}
{%- else %}
{{- '### User:\\n' + message['content'] + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Assistant:\\n' }}{%- endif %}""",
}


class Template(NamedTuple):
    """A chat template. name: what messages call it."""

    name: str
    source: str


def find_template(wanted: str | None, own: Mapping[str, str]) -> Template | None:
    """The template that was asked for, or the model's own; None where none was asked for or is there.

    Args:
        wanted: the name of one of the model's templates or a built-in name, else a path.
        own: name -> source of the model's templates; its usual one is "default".

    Raises:
        TrainError: no such template; not UTF-8.
        FormatError: a file that cannot be read or is larger than 4 MiB.
    """
    if wanted is None:
        source = own.get("default") or (next(iter(own.values())) if len(own) == 1 else None)
        return None if source is None else Template("of the model", source)
    if wanted in own:
        return Template(f"{wanted} of the model", own[wanted])
    if wanted in BUILT_IN:
        return Template(wanted, BUILT_IN[wanted])
    path = Path(wanted)
    if not path.exists():
        names = [*own, *BUILT_IN]
        raise TrainError(path, "no such chat template", expected=f"a path, or one of {', '.join(names)}")
    try:
        return Template(str(path), read_file(path, _MAX_BYTES).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TrainError(path, "chat template", expected="UTF-8", got=f"byte {error.start} is not") from None
