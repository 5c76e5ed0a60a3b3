#!/usr/bin/env python3
"""Golden data of chat templates: rendered conversations, errors, and masks of the assistant's tokens.

    make_golden_chat.py --seed 1 --set dev --out DIR [--smollm2 FOLDER]     # DIR/chat/...: templates written here, and SmolLM2's own
    make_golden_chat.py --seed 2 --set held --out DIR                       # renders every DIR/chat/NAME/template.jinja that is already there

A held template folder holds template.jinja and meta.json with {"special_tokens": {"bos_token": ...}, "source": ...}.
FOLDER is a Hugging Face folder whose tokenizer_config.json has a chat_template (scripts/smollm2_to_hf.py makes one).
Reference: transformers' apply_chat_template with a fixed clock. Needs transformers, jinja2, tokenizers, numpy.
"""
import datetime
import json
import os
import shutil
import sys

from golden_lib import arguments, folder_size, versions, write_json, write_json_rows, write_text

import numpy as np
import jinja2
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from golden_text import PROSE
from make_golden_tokenizers import byte_bpe

NOW = {"dev": datetime.datetime(2025, 3, 9, 7, 5, 2), "held": datetime.datetime(2024, 12, 31, 23, 59, 58)}


class Clock(datetime.datetime):
    """Stands in for datetime in the reference, so that strftime_now is the same every day."""
    fixed = None

    @classmethod
    def now(cls, tz=None):
        return cls.fixed


# -------------------------------------------------------------------------------------------------------- conversations

def tool(name, about, **params):
    return {"type": "function", "function": {"name": name, "description": about, "parameters": {
        "type": "object", "properties": {k: v for k, v in params.items()}, "required": list(params)[:1]}}}


TOOLS = [tool("get_weather", "Current weather of a place. Uses \"celsius\" unless told otherwise.", city={"type": "string", "description": "City & country, e.g. Köln <DE>"},
              unit={"type": "string", "enum": ["celsius", "fahrenheit"]}),
         tool("add", "Adds numbers.", a={"type": "number"}, b={"type": "number"}, exact={"type": "boolean", "default": False})]
DOCUMENTS = [{"title": "Mills", "text": "A mill grinds grain."}, {"title": "Rivers", "text": "A river \"flows\" to the sea."}]


def m(role, content=..., **more):
    return {"role": role, **({} if content is ... else {"content": content}), **more}


def call(name, arguments, id=None):
    return {**({"id": id} if id else {}), "type": "function", "function": {"name": name, "arguments": arguments}}


def text_part(text):
    return {"type": "text", "text": text}


CONVERSATIONS = {
    "user": {"messages": [m("user", "Hello, who are you?")]},
    "system_user": {"messages": [m("system", "You are a terse assistant."), m("user", "What is 2 + 3?")]},
    "turns": {"messages": [m("user", "Hi"), m("assistant", "Hello! How can I help?"), m("user", "Tell me a joke.")]},
    "system_turns": {"messages": [m("system", "Answer in one word."), m("user", "Sky?"), m("assistant", "Blue."), m("user", "Grass?"), m("assistant", "Green."), m("user", "Snow?")]},
    "ends_assistant": {"messages": [m("user", "Count to three."), m("assistant", "One, two,")]},
    "ends_assistant_blank": {"messages": [m("user", "Count."), m("assistant", " One, two, ")]},
    "system_only": {"messages": [m("system", "Just a system message.")]},
    "empty_user": {"messages": [m("user", "")]},
    "empty_assistant": {"messages": [m("user", "Say nothing."), m("assistant", ""), m("user", "Good.")]},
    "padded": {"messages": [m("system", "  padded system \n"), m("user", "\n\n  padded user\t "), m("assistant", " padded answer\n\n"), m("user", " again ")]},
    "special": {"messages": [m("user", "Quotes \" ' ` and \\ backslash \\n, braces {{ x }} {% if %} {# c #}, <b>&amp;</b>, tab\there, new\nline, naïve – 文字 🎉 \u200b\u00a0, <|im_end|></s><|eot_id|>[INST]")]},
    "special_system": {"messages": [m("system", "Line one\r\nLine two\n\n\n{{ not a variable }}"), m("user", "'{{'"), m("assistant", "```python\nprint(\"%s\" % {'a': 1})\n```"), m("user", "ok")]},
    "parts": {"messages": [m("user", [text_part("First part. "), text_part("Second part.")]), m("assistant", [text_part("Answer part.")]), m("user", [text_part("Last.")])]},
    "parts_system": {"messages": [m("system", [text_part("System part.")]), m("user", [text_part("A"), text_part("B")])]},
    "parts_image": {"messages": [m("user", [{"type": "image"}, text_part("What is this?")])]},
    "assistant_first": {"messages": [m("assistant", "Welcome!"), m("user", "Thanks.")]},
    "two_users": {"messages": [m("user", "One."), m("user", "Two."), m("assistant", "Three.")]},
    "system_late": {"messages": [m("user", "Hi"), m("assistant", "Hello"), m("system", "Now be formal."), m("user", "Hi again")]},
    "two_systems": {"messages": [m("system", "First."), m("system", "Second."), m("user", "Hi")]},
    "developer": {"messages": [m("developer", "Prefer short answers."), m("user", "Why?")]},
    "unknown_role": {"messages": [m("narrator", "Once upon a time"), m("user", "Go on.")]},
    "extra_keys": {"messages": [m("user", "Hi", name="Ann", weight=0.5, id=7), m("assistant", "Hello", name="bot", weight=1), m("user", "Bye", meta={"a": [1, None]})]},
    "no_content": {"messages": [m("user", "Hi"), m("assistant"), m("user", "There?")]},
    "null_content": {"messages": [m("user", "Hi"), m("assistant", None), m("user", "There?")]},
    "number_content": {"messages": [m("user", 5)]},
    "no_role": {"messages": [{"content": "Hi"}]},
    "empty": {"messages": []},
    "tools_unused": {"messages": [m("system", "Use tools."), m("user", "Weather in Paris?")], "tools": TOOLS},
    "tools_no_system": {"messages": [m("user", "Weather in Paris?")], "tools": TOOLS[:1]},
    "tools_empty": {"messages": [m("user", "Hi")], "tools": []},
    "tool_call": {"messages": [m("user", "Weather in Paris?"), m("assistant", "", tool_calls=[call("get_weather", {"city": "Paris, \"FR\"", "unit": "celsius"}, "call00001")]),
                               m("tool", "{\"temp\": 21.5}", name="get_weather", tool_call_id="call00001"), m("assistant", "It is 21.5 °C."), m("user", "Thanks!")], "tools": TOOLS},
    "tool_call_open": {"messages": [m("system", "Be exact."), m("user", "Add 1 and 2.5."), m("assistant", tool_calls=[call("add", {"a": 1, "b": 2.5, "exact": True, "note": None}, "abcdefghi")]),
                                    m("tool", "3.5", name="add", tool_call_id="abcdefghi")], "tools": TOOLS},
    "tool_calls_two": {"messages": [m("user", "Weather in Rome and Oslo?"), m("assistant", "Let me look.", tool_calls=[call("get_weather", {"city": "Rome"}, "aaaaaaaaa"), call("get_weather", {"city": "Oslo", "days": [1, 2]}, "bbbbbbbbb")]),
                                    m("tool", "sunny", name="get_weather", tool_call_id="aaaaaaaaa"), m("tool", "snow", name="get_weather", tool_call_id="bbbbbbbbb"), m("assistant", "Sun and snow.")], "tools": TOOLS},
    "tool_call_string": {"messages": [m("user", "Add."), m("assistant", "", tool_calls=[call("add", "{\"a\": 1, \"b\": 2}", "ccccccccc")]), m("tool", "3", name="add", tool_call_id="ccccccccc")], "tools": TOOLS[1:]},
    "tool_call_no_tools": {"messages": [m("user", "Add."), m("assistant", "", tool_calls=[call("add", {"a": -1, "b": 1e-7}, "ddddddddd")]), m("tool", "{\"ok\": true}", name="add", tool_call_id="ddddddddd"), m("user", "And?")]},
    "tool_result_dict": {"messages": [m("user", "Go."), m("assistant", "", tool_calls=[call("add", {}, "eeeeeeeee")]), m("tool", {"result": [1, "é", None, True]}, name="add", tool_call_id="eeeeeeeee")], "tools": TOOLS[1:]},
    "reasoning": {"messages": [m("user", "Is 7 prime?"), m("assistant", "Yes.", reasoning_content="7 has no divisors but 1 and 7."), m("user", "And 8?"), m("assistant", "No.", reasoning_content="8 = 2 * 4.\n")]},
    "think_inline": {"messages": [m("user", "Is 9 prime?"), m("assistant", "<think>\n9 = 3 * 3\n</think>\n\nNo."), m("user", "And 11?")]},
    "think_last": {"messages": [m("user", "Is 9 prime?"), m("assistant", "<think>\n9 = 3 * 3\n</think>\n\nNo.")]},
    "documents": {"messages": [m("user", "What is a mill?")], "documents": DOCUMENTS},
    "long": {"messages": [m("system", "Short.")] + [x for i in range(8) for x in (m("user", f"Question {i}?"), m("assistant", f"Answer {i}."))] + [m("user", "Last?")]},
}


def varied(conversations, seed):
    """The same shapes with other words: every text of some length gets a seeded fragment, before its trailing blanks."""
    rng = np.random.default_rng(seed + 5)
    words = [w for p in PROSE.values() for w in p.split()]

    def walk(value, key=""):
        if isinstance(value, dict):
            return {k: walk(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, key) for v in value]
        if isinstance(value, str) and key in ("content", "text", "reasoning_content", "description", "title") and len(value.strip()) > 2 and value[:1] not in "<{" and "```" not in value:
            core = value.rstrip()
            return core + " " + " ".join(words[int(rng.integers(len(words)))] for _ in range(int(rng.integers(1, 5)))) + value[len(core):]
        return value

    return walk(conversations)


# (conversation, arguments): which combinations every template is tried with
CASES = [(name, {"add_generation_prompt": g}) for name in ("user", "system_user", "turns", "system_turns", "padded", "special", "tool_call", "tools_unused", "reasoning") for g in (False, True)]
CASES += [(name, {"add_generation_prompt": False}) for name in ("ends_assistant", "empty_assistant", "system_only", "special_system", "parts", "parts_image", "two_users", "no_content", "null_content", "extra_keys", "think_last", "tool_calls_two", "no_role", "number_content")]
CASES += [(name, {"add_generation_prompt": True}) for name in ("empty_user", "parts_system", "assistant_first", "system_late", "two_systems", "developer", "unknown_role", "tools_no_system", "tools_empty", "tool_call_open", "tool_call_string",
                                                               "tool_call_no_tools", "tool_result_dict", "think_inline", "documents", "long", "empty")]
CASES += [("ends_assistant", {"continue_final_message": True}), ("ends_assistant_blank", {"continue_final_message": True}), ("parts", {"continue_final_message": True}), ("think_last", {"continue_final_message": True}),
          ("turns", {"continue_final_message": True}), ("ends_assistant", {"continue_final_message": True, "add_generation_prompt": True}),
          ("reasoning", {"continue_final_message": "reasoning_content"}),
          ("user", {"add_generation_prompt": True, "kwargs": {"enable_thinking": False}}), ("turns", {"add_generation_prompt": True, "kwargs": {"enable_thinking": True, "date_string": "1 Jan 2000", "custom": {"a": 1}}}),
          ("tools_unused", {"add_generation_prompt": True, "kwargs": {"tools_in_user_message": False, "builtin_tools": ["wolfram_alpha"]}})]


# --------------------------------------------------------------------------------------- templates written for the dev set

TEMPLATES = {
    "plain_chatml": r"""{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}
{% endif %}
{{ '<|im_start|>' + message.role + '\n' }}
{% if message.role == 'assistant' %}
{% generation %}
{{- message['content'] + '<|im_end|>' }}
{% endgeneration %}
{{ '\n' }}
{% else %}
{{ message['content'] + '<|im_end|>\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}
""",
    "inline_generation": r"""{{ bos_token }}{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        <A>{%- generation -%}{{ message['content'] | trim }}{{ eos_token }}{%- endgeneration -%}</A>
    {%- elif message['role'] == 'user' -%}
        <U>{{ message['content'] }}</U>
    {%- else -%}
        <S role="{{ message['role'] }}">{{ message['content'] | upper }}</S>
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<A>{%- endif -%}""",
    "strict_turns": r"""{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant, but message ' ~ loop.index ~ ' is ' ~ message['role'] ~ '.') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if loop.last and system_message is defined -%}
            {{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' -}}
        {%- else -%}
            {{- '[INST] ' + message['content'] + '[/INST]' -}}
        {%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + message['content'].strip() + eos_token -}}
    {%- else -%}
        {{- raise_exception('Only user and assistant roles are supported!') -}}
    {%- endif -%}
{%- endfor -%}
""",
    "tools_json": r"""{#- tools first, as indented JSON; results as compact JSON -#}
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<h>system</h>\n\nToday: " + date_string + "\n" }}
{%- if tools is defined and tools is not none and tools | length > 0 %}
    {{- "You have " ~ tools | length ~ " function" ~ ("s" if tools | length != 1 else "") ~ ": " ~ tools | map(attribute='function.name') | join(', ') ~ ".\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<eot>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<h>' + message['role'] + '</h>\n\n' + (message['content'] | trim if message['content'] is string else message['content'] | tojson) + '<eot>' }}
    {%- elif 'tool_calls' in message %}
        {%- for tool_call in message.tool_calls %}
            {%- set f = tool_call.function %}
            {{- '<h>assistant</h>\n\n' }}
            {{- '{"name": "' + f.name + '", "parameters": ' }}
            {{- f.arguments if f.arguments is string else f.arguments | tojson }}
            {{- "}<eot>" }}
        {%- endfor %}
    {%- elif message.role == "tool" %}
        {{- "<h>tool</h>\n\n" }}
        {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
            {{- message.content | tojson(separators=(',', ':')) }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<eot>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<h>assistant</h>\n\n' }}
{%- endif %}
""",
    "parts_macro": r"""{%- macro render(content, image='<image>', joiner='') -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is none or content is not defined -%}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' -%}{{ part['text'] }}
            {%- elif part.type == 'image' -%}{{ image }}
            {%- else -%}{{ raise_exception('Unknown part: ' + part.type) }}
            {%- endif -%}
            {%- if not loop.last -%}{{ joiner }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(system='', count=0) -%}
{%- for message in messages if message.role in ['system', 'developer'] -%}
    {%- set ns.system = ns.system + ('\n' if ns.system else '') + render(message.content) -%}
{%- endfor -%}
{%- if ns.system %}{{ 'SYSTEM: ' ~ ns.system ~ '\n' }}{% endif -%}
{%- for message in messages -%}
    {%- if message.role in ['system', 'developer'] -%}{%- continue -%}{%- endif -%}
    {%- set ns.count = ns.count + 1 -%}
    {%- if ns.count > 12 -%}{{ '...\n' }}{%- break -%}{%- endif -%}
    {%- set role = {'user': 'USER', 'assistant': 'MODEL'}.get(message.role, message.role | upper) -%}
    {{ loop.index0 }}/{{ loop.length }} {{ role }}: {{ render(message.content, joiner=' + ') }}{{ '\n' }}
{%- else -%}
    {{ 'no messages' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'MODEL:' }}{%- endif -%}
""",
    "think_history": r"""{%- set ns = namespace(multi_step=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|assistant|>\n' }}{% generation %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\n<call>' ~ (tool_call.function or tool_call).name ~ ' ' ~ (tool_call.function.arguments | tojson) ~ '</call>' }}
        {%- endfor %}
        {{- '<|end|>' }}{% endgeneration %}{{- '\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|user|>' }}{%- endif %}
        {{- '\n<tool>\n' ~ content ~ '\n</tool>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|end|>\n' }}{%- endif %}
    {%- else %}
        {{- '<|' ~ message.role ~ '|>\n' ~ content ~ '<|end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""",
    "all_filters": r"""{% for message in messages -%}
{{ loop.index }}. {{ message.role | title }}{{ message.role | default('?') | length }}{{ message.missing | default('none') }}: {{ message.content | string | trim | replace('\n', '⏎') | indent(2) }}
{% endfor -%}
roles={{ messages | map(attribute='role') | unique | join('|') }}
first={{ (messages | first).role }} last={{ (messages | last).role }} count={{ messages | count }}
users={{ messages | selectattr('role', 'equalto', 'user') | list | length }} others={{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | list }}
lower={{ messages | map(attribute='content') | select('string') | map('lower') | map('trim') | join(' / ') }}
named={{ messages | selectattr('name', 'defined') | map(attribute='name') | join(',', ) }}
nonstring={{ messages | map(attribute='content') | reject('string') | reject('undefined') | list | length }}
{% for key, value in (messages | first).items() %}{{ key }}={{ value | safe }};{% endfor %}

{% for key, value in {'b': 2, 'a': 1} | items -%}{{ key }}{{ value }}{% endfor %} {{ [1, 2.0, none, true, 'x'] | tojson }} {{ 'abc' | list }} {{ 'Straße' | upper }} {{ ['b', 'a'] | join }}
{%- filter upper | trim %}  filtered {{ bos_token }}  {% endfilter %}
{% set block %}
captured {{ messages | length }}
{% endset %}
[{{ block }}]
""",
    "whitespace": """{# a comment line #}
  {% if true %}
    indented {{ bos_token }}
  {% endif %}
a {%- if true %} b {% endif -%} c
{%+ if true %}keep{% endif +%}

x{{- ' y ' -}}z
{% raw %}{{ raw }} {% not a tag %}{% endraw %}
\t{% for message in messages %}
\t\t* {{ message.role }}
\t{% endfor %}
{%- for message in messages %}

{{ message.role }}
{%- endfor %}


{#- eats the lines before
and several lines -#}

end{% if add_generation_prompt %}

go
{% endif %}
tail

""",
    "loops": r"""{%- for message in messages recursive -%}
{{ loop.depth }}:{{ loop.index }}/{{ loop.revindex }}/{{ loop.revindex0 }}{{ ' first' if loop.first }}{{ ' last' if loop.last }} prev={{ loop.previtem.role if loop.previtem is defined else '-' }} next={{ loop.nextitem.role if loop.nextitem is defined else '-' }} {{ loop.cycle('odd', 'even') }} changed={{ loop.changed(message.role) }}
{% endfor -%}
{%- set x = 'outer' -%}
{%- for i in range(3) %}{% set x = i %}{{ x }}{% endfor %} {{ x }}
{% set counter = namespace(n=0, log='') %}
{%- for message in messages %}{% for c in (message.role)[:3] %}{% set counter.n = counter.n + 1 %}{% set counter.log = counter.log ~ c %}{% endfor %}{% endfor -%}
{{ counter.n }} {{ counter.log }}
{% for a, b in [(1, 'x'), (2, 'y')] %}{{ a }}{{ b }}{% endfor %} {% for (a, (b, c)) in [[1, [2, 3]]] %}{{ a + b + c }}{% endfor %}
{% for i in range(10) if i % 3 == 0 %}{{ loop.index }}:{{ i }} {% endfor %}
{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for i in [] %}never{% else %}empty{% endfor %}
{% for i in range(2, 12, 3) %}{{ i }},{% endfor %}{{ range(5)[-1] }}{{ range(3) | list }}
{%- macro outer(n) %}({{ n }}{% if n > 0 %}{{ outer(n - 1) }}{% endif %}){% endmacro %}
{{ outer(3) }}
{%- if messages[-1].role == 'user' and add_generation_prompt %}
>
{%- endif %}""",
    "fallbacks": r"""{%- if tools %}{% set mode = 'tools' %}{% elif documents %}{% set mode = 'rag' %}{% else %}{% set mode = 'chat' %}{% endif -%}
mode={{ mode }}{{ '' if not documents else ' docs=' ~ documents | map(attribute='title') | join('+') }}
{% for message in messages -%}
{%- set text = message.content if message.content is defined and message.content is not none else '(nothing)' -%}
{%- if message.get('name') %}{{ message.name }} ({{ message.role }}){% else %}{{ message['role'] }}{% endif -%}
: {{ text if text is string else (text | map(attribute='text') | select | join('; ') if text is sequence else text) }}
{% if message.tool_calls is defined %}{% for c in message.tool_calls %}-> {{ c.id or 'no id' }} {{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{{ ', ' if not loop.last }}{% endfor %})
{% endfor %}{% endif -%}
{% endfor -%}
{{ undefined_variable }}{{ undefined_variable is defined }}{{ bos_token is defined and bos_token or 'no bos' }} {{ (add_generation_prompt | string | lower) }} {{ custom.a | default('-') if custom is defined else '-' }}""",
}
TOKENS = {"plain_chatml": {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, "whitespace": {"bos_token": "<s>"}, "fallbacks": {}}


# --------------------------------------------------------------------------------------------------------------- snippets

SCOPE = {"s": "Hello World", "e": "", "u": "naïve ☃ 𝄞", "pad": "  x y \n", "n": 3, "z": 0, "neg": -7, "f": 2.5, "t": True, "no": False, "nil": None, "l": [3, 1, 2], "names": ["b", "a", "C", "a"], "mixed": [1, "x", None, 2.5, True],
         "d": {"b": 1, "a": {"c": [10, 20]}, "items": "shadow"}, "rows": [{"k": "x", "v": 1}, {"k": "y", "v": 2}, {"k": "x", "v": 3}, {"v": None}], "html": "<b>&\"'</b>", "csv": "a,b,,c", "lines": "one\n two\n\nthree", "big": 12345678901234567890}

SNIPPETS = r"""
{{ s }}|{{ e }}|{{ u }}|{{ n }}|{{ f }}|{{ t }}|{{ no }}|{{ nil }}|{{ l }}|{{ d.a }}|{{ missing }}|{{ big }}
{{ "a" 'b' }}{{ 'it''s' }}
{{ 'a\nb\t\\\'\"' }}{{ "\x41\u00e9\U0001F600" }}
{{ 1_000 + 0x1f + 0o17 + 0b101 }} {{ 1e3 }} {{ 1.5E-3 }} {{ 1.0 }} {{ 100000000000000000000.0 }} {{ 1e16 }} {{ 1e15 }} {{ 0.0001 }} {{ 0.00001 }}
{{ 7 / 2 }} {{ 6 / 2 }} {{ 7 // 2 }} {{ neg // 2 }} {{ neg % 3 }} {{ 7.5 // 2 }} {{ 7.5 % 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 2 ** 3 ** 2 }} {{ -2 ** 2 }} {{ 1 - 2 - 3 }} {{ 2 * 3 + 4 }} {{ 2 + 3 * 4 }} {{ (2 + 3) * 4 }}
{{ 1 / 0 }}
{{ n ~ f ~ t ~ nil ~ missing ~ l }}
{{ 'a' ~ 1 + 2 }}
{{ 'a' ~ 1 * 2 }} {{ 'x' * 3 }} {{ [1] * 2 + [3] }} {{ 'ab' + 'c' }}
{{ 'a' + 1 }}
{{ s + nil }}
{{ l + 'x' }}
{{ 1 == 1.0 }} {{ t == 1 }} {{ 'a' < 'b' }} {{ [1, 2] < [1, 3] }} {{ 1 < 2 < 3 }} {{ 3 > 2 > 2 }} {{ nil == missing }} {{ missing == missing2 }} {{ 'a' != 'b' }} {{ n >= 3 }} {{ n <= 2 }}
{{ 1 < 'a' }}
{{ not t }} {{ not e }} {{ not missing }} {{ not l }} {{ not 0 }} {{ not '0' }}
{{ t and s }} {{ e and s }} {{ e or s }} {{ nil or missing or 0 }} {{ no or [] }} {{ t or boom() }} {{ no and boom() }}
{{ 1 in l }} {{ 5 not in l }} {{ 'ell' in s }} {{ 'b' in d }} {{ 'c' in d }} {{ nil in mixed }} {{ not 1 in l }}
{{ 1 in 5 }}
{{ 'yes' if t else 'no' }} {{ 'yes' if e }} {{ 'a' if no else 'b' if no else 'c' }} {{ ('x' if t) ~ '|' }}
{{ l[0] }} {{ l[-1] }} {{ l[5] }} {{ s[1] }} {{ s[-1] }} {{ s[99] }} {{ l['0'] }} {{ d['b'] }} {{ d['zz'] }} {{ d.a.c[1] }} {{ d['a']['c'][-1] }} {{ l.0 }}
{{ l[1:] }} {{ l[:-1] }} {{ l[::-1] }} {{ l[::2] }} {{ s[:5] }} {{ s[6:] }} {{ s[::-1] }} {{ s[-5:-1] }} {{ l[5:] }} {{ s[2:2] }} {{ l[-99:99] }}
{{ missing.attr }}
{{ missing['attr'] }}
{{ missing() }}
{{ d.zz }}|{{ d.zz is defined }}
{{ d.zz.y }}
{{ n.real }}|{{ s.nothing }}
{{ nil.x }}
{{ d['items'] }} {{ d.items is callable }} {{ d.items() | list | length }} {{ d.get('items') }}
{{ {} }} {{ {'a': 1, "b": [1, 'x']} }} {{ [] }} {{ [1, 'a', [2.0]] }} {{ (1, 2) }} {{ (1,) }} {{ () }} {{ {'a': {'b': none}} }} {{ ['it\'s', "q\"q", 'both\'"', 'n\n', 'é\x01'] }}
{{ true }} {{ True }} {{ false }} {{ False }} {{ none }} {{ None }}
{{ [true, none, 1.0, missing] }}
{{ s | upper }} {{ s | lower }} {{ s | title }} {{ 'hELLO wORLD' | capitalize }} {{ u | upper }} {{ 'straße ǆ ﬁ' | upper }} {{ 'İI' | lower }} {{ 'they\'re bill\'s 1st' | title }}
[{{ pad | trim }}] [{{ 'xxaxx' | trim('x') }}] [{{ 5 | trim }}]
{{ s | length }} {{ l | length }} {{ d | length }} {{ e | count }} {{ u | length }} {{ range(7) | length }}
{{ 5 | length }}
{{ missing | length }}
{{ s | replace('l', 'L') }} {{ s | replace('l', 'L', 2) }} {{ s | replace('', '-') }} {{ 5 | replace('5', 'x') }}
{{ l | join }} {{ l | join(', ') }} {{ names | join('-') }} {{ mixed | join('|') }} {{ rows | join(',', attribute='k') }} {{ 'abc' | join('.') }}
{{ l | sort }} {{ names | sort }} {{ names | sort(case_sensitive=true) }} {{ l | sort(reverse=true) }} {{ rows[:3] | sort(attribute='v', reverse=true) | map(attribute='v') | list }}
{{ mixed | sort }}
{{ names | unique | list }} {{ l | reverse | list }} {{ s | reverse }} {{ l | first }} {{ l | last }} {{ s | first }} {{ [] | first }} {{ [] | last }} {{ l | min }} {{ l | max }} {{ l | sum }} {{ [] | sum }}
{{ rows | map(attribute='k') | list }} {{ rows | map(attribute='k', default='?') | list }} {{ names | map('upper') | list }} {{ ['a b'] | map('replace', ' ', '_') | join }} {{ [[1, 2], [3]] | map('length') | list }} {{ rows | map(attribute='v') | list }}
{{ l | select('odd') | list }} {{ l | reject('odd') | list }} {{ mixed | select | list }} {{ mixed | select('string') | list }} {{ mixed | reject('none') | list }} {{ l | select('gt', 1) | list }} {{ l | select('in', [1, 2]) | list }}
{{ rows | selectattr('k') | list | length }} {{ rows | selectattr('k', 'equalto', 'x') | map(attribute='v') | list }} {{ rows | rejectattr('k', 'defined') | list }} {{ rows | selectattr('v', 'none') | list }} {{ rows | selectattr('v', '==', 2) | list }}
{{ d | items | list }} {{ d | dictsort }} {{ {'b': 1, 'A': 2} | dictsort }} {{ {'b': 1, 'a': 2} | dictsort(by='value') }} {{ missing | items | list }}
{{ l | list }} {{ 'ab' | list }} {{ d | list }} {{ missing | list }}
{{ missing | default('x') }} {{ nil | default('x') }} {{ nil | default('x', true) }} {{ e | default('x', boolean=true) }} {{ n | default('x') }} {{ missing | d('y') }} {{ missing.x | default('z') }}
{{ n | string }} {{ n | string | length }} {{ f | int }} {{ '42' | int }} {{ 'x' | int }} {{ 'x' | int(7) }} {{ '3.9' | int }} {{ '0x1f' | int(0, 16) }} {{ '2.5' | float }} {{ 'x' | float }} {{ t | int }}
{{ 2.5 | round }} {{ 3.5 | round }} {{ 2.567 | round(2) }} {{ 2.1 | round(0, 'ceil') }} {{ 2.9 | round(method='floor') }} {{ neg | abs }} {{ 1234.5 | round | int }}
{{ lines | indent }}
{{ lines | indent(2, true) }}
{{ lines | indent(width=3, first=true, blank=true) }}
{{ lines | indent('> ') }}
{{ d | tojson }} {{ l | tojson }} {{ s | tojson }} {{ html | tojson }} {{ u | tojson }} {{ nil | tojson }} {{ t | tojson }} {{ f | tojson }} {{ 1.0 | tojson }} {{ 1e20 | tojson }} {{ big | tojson }} {{ 'a"\\/\n\t\b\f\u0001\u007f\u2028' | tojson }}
{{ d | tojson(indent=2) }}
{{ rows | tojson(indent=4) }}
{{ {} | tojson(indent=2) }} {{ [] | tojson(indent=2) }} {{ {'a': []} | tojson(indent=1) }} {{ [[1, [2]]] | tojson(indent=0) }}
{{ d | tojson(ensure_ascii=true) }} {{ u | tojson(ensure_ascii=true) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }} {{ d | tojson(separators=(',', ':')) }} {{ {'a': 1} | tojson(indent=2, separators=(',', ' = ')) }}
{{ {1: 'a', true: 'b', none: 'c', 2.5: 'd'} | tojson }}
{{ missing | tojson }}
{{ (1, 2) | tojson }} {{ range(3) | list | tojson }} {{ namespace(a=1).a | tojson }} {{ dict(a=1, b='x') | tojson }} {{ dict({'a': 1}, b=2) }}
{{ html | safe }} {{ html | escape }} {{ html | e }} {{ html }} {{ html | forceescape }}
{{ s | attr('x') }} {{ d | attr('b') }}
{{ s | nosuchfilter }}
{{ s is nosuchtest }}
{{ s is defined }} {{ missing is defined }} {{ missing is undefined }} {{ nil is none }} {{ nil is not none }} {{ s is string }} {{ n is number }} {{ f is number }} {{ t is number }} {{ '1' is number }} {{ n is integer }} {{ t is integer }} {{ f is float }} {{ t is boolean }} {{ 1 is boolean }} {{ t is true }} {{ 1 is true }} {{ no is false }}
{{ l is iterable }} {{ s is iterable }} {{ d is iterable }} {{ n is iterable }} {{ nil is iterable }} {{ missing is iterable }} {{ l is sequence }} {{ s is sequence }} {{ d is sequence }} {{ n is sequence }} {{ d is mapping }} {{ l is mapping }} {{ range(3) is sequence }} {{ (1, 2) is sequence }}
{{ n is odd }} {{ n is even }} {{ 9 is divisibleby 3 }} {{ 9 is divisibleby(4) }} {{ n is eq 3 }} {{ n is equalto 3 }} {{ n is ne 3 }} {{ n is lt 4 }} {{ n is ge 3 }} {{ n is sameas 3 }} {{ 'a' is in 'abc' }} {{ 1 is in [1] }} {{ 'A' is upper }} {{ 'a' is lower }} {{ dict is callable }} {{ s is filter }} {{ 'upper' is filter }} {{ 'odd' is test }}
{{ not s is string }} {{ s is string and n is number }} {{ s is not string or t }} {{ (n + 1) is even }} {{ n + 1 is even }}
[{{ pad.strip() }}] [{{ pad.lstrip() }}] [{{ pad.rstrip() }}] [{{ 'xxaxx'.strip('x') }}] [{{ 'abcab'.lstrip('ab') }}] [{{ 'a\n\n'.rstrip('\n') }}] [{{ '\u00a0x\u2003'.strip() }}] [{{ pad.strip(none) }}]
{{ csv.split(',') }} {{ csv.split(',', 1) }} {{ s.split() }} {{ '  a  b '.split() }} {{ ' a  b '.split(' ') }} {{ ''.split() }} {{ ''.split(',') }} {{ s.rsplit('o', 1) }} {{ s.split('lo')[0] }} {{ s.split('zz')[-1] }} {{ lines.splitlines() }} {{ s.partition(' ') }}
{{ s.split('') }}
{{ s.startswith('He') }} {{ s.endswith('ld') }} {{ s.startswith('x') }} {{ s.startswith(('x', 'H')) }} {{ s.startswith('World', 6) }} {{ s.upper() }} {{ s.lower() }} {{ 'ab cd'.title() }} {{ 'ab'.capitalize() }} {{ s.swapcase() }} {{ s.replace('l', '') }} {{ s.replace('l', 'L', 1) }} {{ s.find('o') }} {{ s.find('zz') }} {{ s.count('l') }} {{ s.index('W') }} {{ '-'.join(names) }} {{ 'a'.zfill(3) }} {{ 'a'.ljust(3) }}| {{ 'x'.center(5, '*') }} {{ 'abc'.isalpha() }} {{ '12'.isdigit() }} {{ 'a{}c'.format('b') }} {{ s.removeprefix('Hello ') }} {{ s.removesuffix('ld') }} {{ s.encode('utf-8') | length }}
{{ d.get('b') }} {{ d.get('zz') }} {{ d.get('zz', 'x') }} {{ d.keys() | list }} {{ {'a': 1}.values() | list }} {{ {'a': 1, 'b': 2}.items() | list }} {% for k, v in {'x': 1}.items() %}{{ k }}={{ v }}{% endfor %} {% for k in d %}{{ k }} {% endfor %}
{{ l.index(1) }} {{ l.count(2) }} {{ l.copy() }}
{% set x = [] %}{{ x.append(1) }}
{% set x = {} %}{{ x.update({'a': 1}) }}
{{ l.pop() }}
{% set x = [1] %}{% set x = x + [2] %}{{ x }}
{{ s.__class__ }}|{{ s.__class__ is defined }}
{{ s.__class__.__mro__ }}
{{ ''['__class__'] }}|{{ (s | attr('__class__')) }}
{{ range(100001) | length }}
{{ range(100000) | length }} {{ range(0) | list }} {{ range(5, 0, -2) | list }} {{ range(1, 3) }}
{{ raise_exception('boom \'quoted\' ' ~ n) }}
{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ strftime_now('%d %b %Y') }} {{ strftime_now('%A, %B %d') }} {{ strftime_now('%j %U %y %I %p %%') }} {{ strftime_now('no code') }}
{% if t %}a{% elif no %}b{% else %}c{% endif %}{% if no %}a{% elif t %}b{% endif %}{% if no %}a{% else %}c{% endif %}{% if missing %}x{% endif %}
{% for x in l %}{{ x }}{% else %}none{% endfor %}{% for x in [] %}{{ x }}{% else %}none{% endfor %}
{% for x in missing %}{{ x }}{% else %}empty{% endfor %}
{% for x in nil %}{{ x }}{% endfor %}
{% for x in n %}{{ x }}{% endfor %}
{% for c in u %}[{{ c }}]{% endfor %}
{% for a, b in d.a.items() %}{{ a }}{{ b }}{% endfor %}{% for a, b in [1, 2] %}{% endfor %}
{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}
{% for x in l %}{% for y in 'ab' %}{{ loop.index }}{{ y }}{% endfor %}{{ loop.index }} {% endfor %}
{% for x in l %}{% set outer = loop %}{% for y in 'ab' %}{{ outer.index }}{{ loop.index }} {% endfor %}{% endfor %}
{% for x in l if x > 1 %}{{ loop.index }}:{{ x }} {% endfor %}{{ x }}
{% for x in rows recursive %}{{ x.v }}{% endfor %}
{% for x in [[1, [2, []]]] recursive %}{{ x[0] }}{% if x[1] %}({{ loop([x[1]]) }}){% endif %}{% endfor %}
{% for x in range(6) %}{% if x == 1 %}{% continue %}{% endif %}{% if x == 4 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% break %}
{% set x = 1 %}{% if t %}{% set x = 2 %}{% endif %}{{ x }}{% for i in l %}{% set x = 3 %}{% endfor %}{{ x }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set a, b = b, a %}{{ a }}{{ b }}
{% set ns = namespace(x=1) %}{% for i in l %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{% set ns.y = 'new' %}{{ ns.y }}{{ ns.zz is defined }}
{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a + ns.b }}
{% set d.b = 5 %}{{ d.b }}
{% set x %}block {{ n }}{% endset %}{{ x }}{% set y | upper %}abc{% endset %}{{ y }}
{% macro f(a, b='B', c=none) %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ f(1) }}{{ f(1, 2) }}{{ f(c=3, a=1) }}{{ f() }}{{ f(1) | upper | length }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(zz=2) }}
{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, x=3) }}
{% macro f(x) %}{{ x }}:{{ caller('in') }}{% endmacro %}{% call(y) f('a') %}<{{ y }}>{% endcall %}
{% macro f() %}{{ s }}{{ n }}{% endmacro %}{% set n = 9 %}{{ f() }}
{% macro f(x) %}{% if x %}{{ x }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(4) }}
{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}
{% filter upper %}abc {{ s }}{% endfilter %}{% filter replace('a', 'b') | upper %}a a{% endfilter %}
{% with x = 5, y = 6 %}{{ x + y }}{% endwith %}{{ x }}
{% generation %}a{{ n }}{% endgeneration %}b
{% generation %}a
{% include 'x' %}
{% import 'x' as y %}
{% extends 'x' %}
{% block b %}in block{% endblock %}
{% autoescape true %}{{ html }}{% endautoescape %}
{% do l %}
{% trans %}x{% endtrans %}
{% for %}{% endfor %}
{{ 1 + }}
{{ (1 }}
{{ 'abc }}
{% nosuchtag %}
{{ }}
{# unclosed
{{ l[1 }}
{{ 1 2 }}
{{ a.b.c( }}
{%- set a = 1 -%} x {%- if t -%} y {%- endif -%} z
a {{- ' b ' -}} c {{ ' d ' }} e
  {% if t %}x{% endif %}
x  {% if t %}y{% endif %}  z
a{# c #}b{#- c -#} c {#- d #} e
{{ '{{' }}{{ '}}' }}{% raw %}{{ x }}{% y %}{# z #}{% endraw %}{%- raw -%} r {%- endraw -%} s
{{ "{%" }}{{ '#}' }}
{{- s -}}{{+ 1 }}{{ -1 }}{{ - n }}{{- -n }}
{{ s|upper|lower|title }}{{ s | replace("o", "0")|upper }}{{ (s ~ n) | upper }}{{ -n | abs }}{{ (-n) | abs }}{{ 1 + 2 | string }}
{{ 'a' 'b' ~ 'c' }}{{ [1, 2, ] }}{{ {'a': 1, } }}{{ (1, ) }}
{{ dict(a=1).a }}{{ [d, rows][0].b }}{{ {'x': [1, {'y': 'deep'}]}.x[1]['y'] }}{{ [1, 2, 3][n - 1] }}{{ {n: 'three'}[3] }}
{% set j = joiner('; ') %}{{ j() }}a{{ j() }}b{% set c = cycler('x', 'y') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}
{{ 0.1 + 0.2 }} {{ 1 / 3 }} {{ 2 / 3 }} {{ 1e300 * 1e10 }} {{ 100 * 1.1 }} {{ 3.0 }} {{ 1e2 }} {{ 123456789.123456789 }} {{ 5e-324 }} {{ 1.7976931348623157e308 }} {{ 0.1 }} {{ -0.0 }}
{{ big + 1 }} {{ big * big }} {{ 2 ** 70 }} {{ big // 7 }} {{ big % 1000 }} {{ -big }} {{ big == big + 0.0 }} {{ big > 1e19 }}
{{ t + t }} {{ t * 3 }} {{ 'x' * t }} {{ no + 1 }} {{ [t, no] | sum }}
""".strip("\n").split("\n")


RARE = r"""
{{ l | batch(2) | list }} {{ [1, 2, 3] | batch(2, 'x') | list }} {{ l | slice(2) | list }}
{{ s | wordcount }} {{ s | center(15) }}| {{ 'a b&c/d' | urlencode }} {{ '<p>x</p> y' | striptags }} {{ '%s=%05.1f' | format('a', 3.14159) }}
{{ s | truncate(8) }} {{ 'a long sentence with words' | truncate(12) }} {{ 'a long sentence' | truncate(9, true, '…') }}
{% for g in rows[:3] | groupby('k') %}{{ g.grouper }}:{{ g.list | length }} {% endfor %}
{{ html | escape }} {{ html | e | safe }} {{ ('<' | e) ~ '<' }}
{{ l | pprint }} {{ 'a b c' | wordwrap(3) }} {{ 3000 | filesizeformat }} {{ 5 | xmlattr if false }}
{% set j = joiner('; ') %}{{ j() }}a{{ j() }}b{% set c = cycler('x', 'y') %}{{ c.next() }}{{ c.next() }}{{ c.current }}
{% for x in [[1, [2, []]]] recursive %}{{ x[0] }}{% if x[1] %}({{ loop([x[1]]) }}){% endif %}{% endfor %}
{% autoescape true %}{{ html }}{{ html | safe }}{% endautoescape %}
{% macro f(x) %}{{ x }}:{{ caller('in') }}{% endmacro %}{% call(y) f('a') %}<{{ y }}>{% endcall %}
{{ rows | map(attribute='v') | select('none') | list }} {{ [[1, 'a'], [0, 'b']] | sort(attribute=0) }} {{ rows[:3] | sum(attribute='v') }} {{ names | min }} {{ names | max(case_sensitive=true) }} {{ rows[:3] | max(attribute='v') }}
{{ s.translate({}) if false else s.expandtabs(4) }} {{ 'é'.encode() | length }} {{ 'ab'.join(['x', 'y']) }} {{ 'Σας'.casefold() }} {{ 'aXb'.swapcase() }} {{ 'a-b'.rpartition('-') }}
""".strip("\n").split("\n")

MULTILINE = [
    "{{ 'a\\\nb' }}", "{{ 'a\nb' }}", "a\n{% if t %}\nb\n{% endif %}\nc\n", "a\n  {% if t %}  \n  b\n  {% endif %}\t\nc", "a\n{%- if t -%}\n b \n{%- endif -%}\nc", "a\n  {%+ if t %}b{% endif %}\n", "a{% if t %}\n\n\nb{% endif %}\n\n",
    "{# c #}\na\n  {# d #}\nb\n", "{#- c -#}\n\na {#- d -#}\n", "a\n{{ s }}\nb\n  {{ s }}  \nc", "a\n{{- s -}}\nb", "  {{- s }}\n", "{% for x in l %}\n* {{ x }}\n{% endfor %}\nend", "{% for x in l -%}\n* {{ x }}\n{%- endfor %}\nend",
    "\n\n{% set x = 1 %}\n\n{{ x }}\n\n", "{% raw %}\n{{ x }}\n{% endraw %}\nz", "a\r\n{% if t %}\r\nb\r\n{% endif %}\r\nc\r\n", "{% set x %}\n a\n{% endset %}\n[{{ x }}]", "{% macro f() %}\n m\n{% endmacro %}\n[{{ f() }}]", "{{ lines }}\n", "x\n\n",
    "x\r\n", "{{ s }}\n{{ s }}", "{% filter indent(2) %}\na\nb\n{% endfilter %}", "{{\n s\n | upper\n}}", "{%\n if t\n%}y{%\nendif\n%}", "\t{% if t %}x{% endif %}\t{% if t %}y{% endif %}\n", "text {% if t %}\nline{% endif %} tail\n  {% if t -%}\n  z\n  {%- endif %}\nq",
    "{% generation %}\na\n{% endgeneration %}\nb\n", "  {% generation %}x{% endgeneration %}\n", "{% for x in [1] %}\n  {% generation %}\n  {{ x }}\n  {% endgeneration %}\n{% endfor %}", "a\n\u00a0{% if t %}b{% endif %}", "a\n\n  {%- if t %} b{% endif %}", "{{ 'x' -}}\n\n y {{- 'z' }}",
]


class Maker:
    """Random snippets: expressions of a known type over SCOPE, inside random statements and whitespace control."""

    def __init__(self, rng):
        self.rng = rng

    def pick(self, *options):
        return options[int(self.rng.integers(len(options)))]

    def text(self, depth):
        if depth <= 0:
            return self.pick("s", "e", "u", "pad", "html", "csv", "lines", "'lit'", "'a b'", '"\\n"', "d['items']", "rows[0].k", "names[1]")
        t, n, b, q = self.text, self.number, self.boolean, self.seq
        return self.pick(
            lambda: f"({t(depth - 1)} ~ {self.any(depth - 1)})", lambda: f"({t(depth - 1)} + {t(depth - 1)})", lambda: f"{t(depth - 1)}.{self.pick('strip()', 'lstrip()', 'rstrip()', 'upper()', 'lower()', 'title()', 'strip(chr)', 'rstrip(chr)').replace('chr', self.pick(repr('x'), repr(' '), repr('l')))}",
            lambda: f"({t(depth - 1)} | {self.pick('upper', 'lower', 'trim', 'title', 'capitalize', 'string', 'safe', 'reverse', 'tojson', 'length', 'first', 'last', 'indent(2)', 'indent(1, true)', 'escape')})",
            lambda: f"{t(depth - 1)}.replace({self.pick(repr('l'), repr(' '), repr('a'))}, {t(0)})", lambda: f"({t(depth - 1)} if {b(depth - 1)} else {t(depth - 1)})", lambda: f"({q(depth - 1)} | join({self.pick(repr(', '), repr(''), repr('/'))}))",
            lambda: f"{t(depth - 1)}[{self.pick('0', '-1', '1:', ':-1', '::-1', '2:5', '::2', '-3:')}]", lambda: f"({t(depth - 1)}.split({self.pick('', repr(','), repr(' '), repr('o'))})[{self.pick('0', '-1')}])",
            lambda: f"({self.any(depth - 1)} | tojson)", lambda: f"({self.any(depth - 1)} | string)", lambda: f"({self.pick('missing', 'nil', 'e')} | default({t(depth - 1)}, {self.pick('true', 'false')}))", lambda: f"({t(depth - 1)} * {self.pick('0', '1', '2')})")()

    def number(self, depth):
        if depth <= 0:
            return self.pick("n", "z", "neg", "f", "1", "2", "10", "0.5", "l[1]", "d.b", "rows[1].v", "d.a.c[0]")
        n = self.number
        return self.pick(lambda: f"({n(depth - 1)} {self.pick('+', '-', '*')} {n(depth - 1)})", lambda: f"({n(depth - 1)} {self.pick('//', '%', '/')} {self.pick('2', '3', 'n', 'f')})", lambda: f"({self.text(depth - 1)} | length)", lambda: f"({self.seq(depth - 1)} | {self.pick('length', 'count')})",
                         lambda: f"({n(depth - 1)} | {self.pick('abs', 'int', 'float', 'round')})", lambda: f"({n(depth - 1)} if {self.boolean(depth - 1)} else {n(depth - 1)})", lambda: f"(-{n(depth - 1)})", lambda: f"{self.text(depth - 1)}.count('l')")()

    def boolean(self, depth):
        if depth <= 0:
            return self.pick("t", "no", "s", "e", "l", "missing", "nil", "n", "z", "true", "d.zz")
        b, n, t = self.boolean, self.number, self.text
        return self.pick(lambda: f"(not {b(depth - 1)})", lambda: f"({b(depth - 1)} {self.pick('and', 'or')} {b(depth - 1)})", lambda: f"({n(depth - 1)} {self.pick('<', '>', '<=', '>=', '==', '!=')} {n(depth - 1)})", lambda: f"({t(depth - 1)} {self.pick('==', '!=', '<')} {t(depth - 1)})",
                         lambda: f"({t(0)} {self.pick('in', 'not in')} {self.pick('s', 'names', 'csv', 'd')})", lambda: f"({self.any(depth - 1)} is {self.pick('', 'not ')}{self.pick('string', 'number', 'none', 'defined', 'undefined', 'iterable', 'mapping', 'sequence', 'boolean', 'integer', 'float', 'true', 'false')})",
                         lambda: f"{t(depth - 1)}.{self.pick('startswith', 'endswith')}({self.pick(repr('H'), repr('d'), 'e')})")()

    def seq(self, depth):
        if depth <= 0:
            return self.pick("l", "names", "mixed", "[1, 'x']", "[]", "d.a.c", "csv.split(',')", "range(4) | list", "['b', 'a']")
        q = self.seq
        return self.pick(lambda: f"({q(depth - 1)} + {q(depth - 1)})", lambda: f"({q(depth - 1)})[{self.pick('1:', ':-1', '::-1', ':2')}]", lambda: f"({q(depth - 1)} | {self.pick('list', 'reverse | list', 'unique | list', 'select | list', 'reject(none_test) | list', 'map(str_filter) | list').replace('none_test', repr('none')).replace('str_filter', repr('string'))})",
                         lambda: f"[{self.any(depth - 1)}, {self.any(depth - 1)}]", lambda: f"(rows | map(attribute='{self.pick('k', 'v')}') | list)", lambda: f"(rows | {self.pick('selectattr', 'rejectattr')}('k'{self.pick('', ', ' + repr('defined'), ', ' + repr('equalto') + ', ' + repr('x'))}) | list)",
                         lambda: f"({self.text(depth - 1)} | list)", lambda: f"(d | items | list)")()

    def any(self, depth):
        return self.pick(self.text, self.number, self.boolean, self.seq)(depth)

    def statement(self, depth):
        o, c = self.pick("{%", "{%", "{%-"), self.pick("%}", "%}", "-%}")
        gap = lambda: self.pick("", " ", "\n", "  \n", "\n  ", "x", " y ")  # noqa: E731
        body = lambda: self.statement(depth - 1) if depth > 0 and self.rng.random() < 0.5 else f"{self.pick('{{', '{{-')} {self.any(self.pick(1, 2))} {self.pick('}}', '-}}')}"  # noqa: E731
        return gap() + self.pick(
            lambda: f"{o} if {self.boolean(2)} {c}{gap()}{body()}{gap()}{o} else {c}{gap()}{body()}{gap()}{{% endif {c}",
            lambda: f"{o} for x in {self.seq(1)} {c}{gap()}{{{{ loop.{self.pick('index', 'index0', 'first', 'last', 'length', 'revindex')} }}}}{{{{ x }}}}{gap()}{o} endfor {c}",
            lambda: f"{o} for x in {self.seq(1)} if x is {self.pick('string', 'number', 'not none')} {c}{{{{ x }}}}{gap()}{o} endfor {c}",
            lambda: f"{o} set v = {self.any(2)} {c}{gap()}{{{{ v }}}}", lambda: f"{o} set v {c}{gap()}{body()}{gap()}{{% endset {c}[{{{{ v }}}}]",
            lambda: f"{o} set ns = namespace(a={self.number(1)}) {c}{{% for i in range(3) %}}{{% set ns.a = ns.a + i %}}{{% endfor %}}{gap()}{{{{ ns.a }}}}",
            lambda: f"{o} macro f(a, b={self.text(0)}) {c}{gap()}<{{{{ a }}}}|{{{{ b }}}}>{gap()}{{% endmacro {c}{{{{ f({self.any(1)}) }}}}{{{{ f({self.any(0)}, b={self.any(1)}) }}}}",
            lambda: f"{o} filter {self.pick('upper', 'trim', 'lower', 'indent(1)')} {c}{gap()}{body()}{gap()}{{% endfilter {c}", lambda: f"{{# note #}}{gap()}{body()}{self.pick('{#- c -#}', '')}", body)() + gap()


def run_snippet(template):
    """Rendered text, or the error's class."""
    try:
        return {"rendered": chat_template_utils._compile_jinja_template(template).render(**SCOPE)}
    except RecursionError:
        return {"error": "RecursionError"}
    except Exception as e:
        row = {"error": type(e).__name__}
        if type(e) is jinja2.exceptions.TemplateError:
            row["message"] = str(e)  # raise_exception: the message is the template's own
        return row


def snippets(seed, held):
    rng = np.random.default_rng(seed + 99)
    maker, rows, seen = Maker(rng), [], set()
    texts = [] if held else SNIPPETS + MULTILINE + RARE
    wanted, errors = (len(texts) + 220 if not held else 420), 0
    for text in texts:
        rows.append({"template": text, **({"rare": True} if text in RARE else {}), **run_snippet(text)})
    while len(rows) < wanted:
        kind = maker.pick("e", "e", "s")
        text = "{{ %s }}" % maker.any(maker.pick(1, 2, 3)) if kind == "e" else "".join(maker.statement(2) for _ in range(maker.pick(1, 2)))
        if text in seen or len(text) > 500:
            continue
        seen.add(text)
        row = {"template": text, **run_snippet(text)}
        if "error" in row:
            errors += 1
            if errors > wanted // 8:
                continue
        if " object at 0x" in row.get("rendered", "") or "0x7f" in row.get("rendered", "") or "dict_items" in row.get("rendered", "") or len(row.get("rendered", "")) > 2000:
            continue
        rows.append(row)
    for r in rows:
        assert "0x7f" not in r.get("rendered", ""), r
    return rows


# --------------------------------------------------------------------------------------------------------------- rendering

def load_tokenizer(seed):
    return byte_bpe(seed + 40, 460, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|im_start|>", "<|im_end|>", "<s>", "</s>"])


def render_case(tok, template, tokens, conversation, options):
    data = CONVERSATIONS[conversation]
    kwargs = {k: v for k, v in options.items() if k != "kwargs"}
    common = dict(tools=data.get("tools"), documents=data.get("documents"), chat_template=template, **tokens, **options.get("kwargs", {}))
    row = {"conversation": conversation, **options}
    messages = json.loads(json.dumps(data["messages"]))
    try:
        row["rendered"] = tok.apply_chat_template(messages, tokenize=False, **kwargs, **common)
    except Exception as e:
        row["error"] = type(e).__name__
        if type(e) is jinja2.exceptions.TemplateError:
            row["message"] = str(e)
        return row
    assert json.loads(json.dumps(data["messages"])) == messages
    if "{% generation" in template or "{%- generation" in template:
        if not options.get("continue_final_message"):
            out = tok.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs, **common)
            text, spans = chat_template_utils.render_jinja_template(
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]], return_assistant_tokens_mask=True, add_generation_prompt=kwargs.get("add_generation_prompt", False), **common)
            assert text[0] == row["rendered"]
            row["spans"] = [[len(text[0][:a].encode("utf-8")), len(text[0][:b].encode("utf-8"))] for a, b in spans[0]]
            ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
            assert len(ids) == len(mask) and tok.backend_tokenizer.encode(text[0], add_special_tokens=False).ids == ids
            edges = [i for i in range(len(mask) + 1) if (mask[i - 1] if i else 0) != (mask[i] if i < len(mask) else 0)]
            row["mask"] = [[a, b] for a, b in zip(edges[::2], edges[1::2])]
            assert [int(any(a <= i < b for a, b in row["mask"])) for i in range(len(mask))] == mask
            if row["spans"]:
                row["ids"] = ids
    return row


README = """Golden data of chat templates
=============================
conversations.json   named inputs: messages, tools, documents.
NAME/template.jinja, NAME/meta.json (special_tokens: the variables given beside messages; source), NAME/cases.json:
  conversation, add_generation_prompt, continue_final_message, kwargs   the call
  rendered        the exact text, or
  error           class of the failure; message only for raise_exception (then it must be the same text)
  spans           byte ranges [begin, end) in UTF-8 that {% generation %} marks (several may touch); ids: the text encoded with tokenizer.json of
                  this folder, no special tokens added (left out without spans); mask: token ranges [begin, end) that belong to the assistant.
                  A token belongs to a span when it holds the span's first or last character or lies between.
snippets.json        small templates over the variables in "scope": rendered text or class of the error; "rare" marks what chat templates hardly use.
index.json           "now" is the clock of strftime_now.

How the reference (transformers apply_chat_template) treats its input, as far as templates can see it:
- an empty conversation is an error before rendering; a message key whose value is null is removed; values are plain JSON data;
- reasoning_content, thinking and reasoning are aliases: the first that is present is copied to reasoning_content, and to thinking if that is absent;
- continue_final_message appends a marker to the last message's text (last text part of a list), renders, and cuts at the last marker; if the template
  stripped the blank after the marker the text before is right-stripped too. It is an error when the last message's text does not appear, when the template never mentions the
  field, or together with add_generation_prompt. A string value names another field (reasoning_content);
- the environment is jinja2's ImmutableSandboxedEnvironment with trim_blocks, lstrip_blocks, loopcontrols: append, update, pop and the like are a SecurityError,
  attributes that begin with an underscore are undefined, range is limited to 100,000 items, there is no loader for include, import, extends.
"""


def main():
    args = arguments(__doc__, [("--smollm2", {"default": None, "help": "folder with SmolLM2's tokenizer_config.json"})])
    held = args.set == "held"
    root = os.path.join(args.out, "chat")
    Clock.fixed = NOW[args.set]
    if held:
        CONVERSATIONS.update(varied(CONVERSATIONS, args.seed))
    chat_template_utils.datetime = Clock
    if not held:
        shutil.rmtree(root, ignore_errors=True)
        for name, template in TEMPLATES.items():
            write_text(os.path.join(root, name, "template.jinja"), template)
            write_json(os.path.join(root, name, "meta.json"), {"special_tokens": TOKENS.get(name, {"bos_token": "<s>", "eos_token": "</s>"}), "source": "written for this set"})
        if args.smollm2:
            with open(os.path.join(args.smollm2, "tokenizer_config.json"), encoding="utf-8") as f:
                config = json.load(f)
            write_text(os.path.join(root, "smollm2", "template.jinja"), config["chat_template"])
            write_json(os.path.join(root, "smollm2", "meta.json"), {"special_tokens": {k: config[k] for k in ("bos_token", "eos_token", "pad_token", "unk_token")}, "source": "SmolLM2-135M-Instruct"})
    names = sorted(n for n in os.listdir(root) if os.path.exists(os.path.join(root, n, "template.jinja")))
    assert names, "no templates"
    core = load_tokenizer(args.seed)
    write_text(os.path.join(root, "tokenizer.json"), json.dumps(json.loads(core.to_str()), ensure_ascii=False, separators=(",", ":")))
    tok = PreTrainedTokenizerFast(tokenizer_file=os.path.join(root, "tokenizer.json"))
    index = {}
    for name in names:
        with open(os.path.join(root, name, "template.jinja"), encoding="utf-8", newline="") as f:
            template = f.read()
        with open(os.path.join(root, name, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        rows, size = [], 0
        cases = CASES if not held else [CASES[i] for i in sorted(range(len(CASES)), key=lambda i: (i >= 12, (i * 7919 + len(name)) % 101))]
        for conversation, options in cases:
            row = render_case(tok, template, meta["special_tokens"], conversation, options)
            size += len(json.dumps(row))
            if size > (40000 if not held else 16500) and len(rows) >= 12:  # long preambles: a dozen cases are enough
                break
            assert "0x7f" not in row.get("rendered", ""), row
            rows.append(row)
        good = sum("rendered" in r for r in rows)
        assert good >= 8, (name, good)
        write_json_rows(os.path.join(root, name, "cases.json"), {"template": name}, rows)
        index[name] = {"cases": len(rows), "errors": len(rows) - good, "masks": sum("mask" in r for r in rows), "source": meta["source"]}
    rows = snippets(args.seed, held)
    write_json_rows(os.path.join(root, "snippets.json"), {"about": "small templates over scope", "scope": SCOPE}, rows, key="snippets")
    write_json_rows(os.path.join(root, "conversations.json"), {"about": "inputs of the cases"}, [{"name": k, **v} for k, v in CONVERSATIONS.items()], key="conversations")
    write_text(os.path.join(root, "README"), README)
    write_json(os.path.join(root, "index.json"), {"about": "chat templates; see README", "set": args.set, "seed": args.seed, "now": NOW[args.set].isoformat(),
               "versions": versions("transformers", "jinja2", "tokenizers", "numpy"), "snippets": len(rows), "templates": index})
    print("chat", args.set, folder_size(root), "bytes", len(names), "templates", len(rows), "snippets", sum("error" in r for r in rows), "errors in snippets")


if __name__ == "__main__":
    sys.exit(main())
