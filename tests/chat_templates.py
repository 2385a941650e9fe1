"""Chat templates with the constructs that published models' have, and what transformers renders.

The golden texts in golden/chat.json were made once, in an environment of their own:

    pip install transformers==5.24.0 jinja2 && python tests/chat_templates.py

The templates are written for this test, after those of the models that they are named by.
"""

import datetime
import json
import pathlib

GOLDEN = pathlib.Path(__file__).parent / "golden" / "chat.json"
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TODAY = "<today>"  # stands for the date in the golden texts

TEMPLATES = {
  "chatml": """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] \
+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% endif %}""",
  "llama_2": """\
{% if messages[0]['role'] == 'system' %}
  {% set loop_messages = messages[1:] %}
  {% set system_message = messages[0]['content'] %}
{% else %}
  {% set loop_messages = messages %}
  {% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {% endif %}
  {% if loop.index0 == 0 and system_message != false %}
    {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
  {% else %}
    {% set content = message['content'] %}
  {% endif %}
  {% if message['role'] == 'user' %}
    {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
  {%- elif message['role'] == 'assistant' %}
    {{- ' ' + content.strip() + ' ' + eos_token }}
  {%- endif %}
{% endfor %}""",
  "llama_3": """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
  {%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
  {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
  {%- set system_message = messages[0]['content'] | trim %}
  {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
  {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
  {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
  "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" or message["role"] == "assistant" %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- endif %}
            {%- endfor %}
            {{- "] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + " [/INST]" }}{%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
  "gemma": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not \
supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}\
{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' \
+ role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
  "phi": """\
{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + \
message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + \
message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + \
message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}\
{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
  "qwen": """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and \
not(message.content.startswith('<tool_response>') \
and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {{- tool_call.arguments | tojson }}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
  "deepseek": """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}\
{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}\
{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}\
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}\
{{'<｜User｜>' + message['content']}}\
{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}\
{% set content = message['content'] %}{% if '</think>' in content %}\
{% set content = content.split('</think>')[-1] %}{% endif %}\
{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}""",
  "smollm": """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}\
{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}\
{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
  "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
  "command_r": """\
{{ bos_token }}{%- macro turn(role, text) -%}<|START_OF_TURN_TOKEN|><|{{ role | upper }}_TOKEN|>\
{{ text | trim }}<|END_OF_TURN_TOKEN|>{%- endmacro -%}
{%- if documents %}{% for document in documents %}Document: {{ loop.index0 }}
{% for key, value in document.items() %}{{ key }}: {{ value }}
{% endfor %}{% endfor %}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' %}{{ turn('chatbot', message.content) }}
{%- else %}{{ turn(message.role, message.content) }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}""",
  "granite": """\
{%- for message in messages %}
  {%- if loop.first and message.role != 'system' %}
{{- 'system\\nKnowledge Cutoff Date: April 2024.\\nToday\\'s Date: ' + strftime_now('%Y-%m-%d') }}
  {%- endif %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {%- if loop.index > 4 %}{% break %}{% endif %}
{{- '\\n' + message['role'] + ': ' + message['content'] }}
{%- endfor %}
{{ {'b': 1, 'a': 'é<>&\\''} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ messages | tojson(ensure_ascii=true) }}
{{ dict(a=1, b='x') | tojson }} {{ [1, 2.5, none, true] | tojson(indent=2) }}""",
  "trimmed": """
{#- a comment -#}
    {% if true %}
  kept spaces
    {% endif %}
{{ messages | map(attribute='role') | unique | join(', ') }}
\t{%- for m in messages if m.role in ['user', 'tool'] %}
{{ loop.index }}/{{ loop.length }}: {{ m.content | replace('\\n', ' ') | title }}
{% else %}
nobody
{% endfor %}
{{ messages[-1].get('name', 'no name') }} {{ messages[-1].missing }} {{ pad_token }}

""",
  "mutating": "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}{{ messages }}",
  "reaching": "{{ messages.__class__.__mro__ }}",
  "underscored": "{% set ns = namespace(_a=1) %}{{ ns._a }}",
  "strftime_now": (
    "Today {{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m.content }}{% endfor %}"
  ),
  "generation": (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
  ),
  "generation_scope": (
    "{% set x = 'outer' %}{% for m in messages %}{%- generation -%} {{ m.role }} {{ x }} "
    "{% set x = 'inner' %}{{ x }}{%- endgeneration -%}{{ x }};{% endfor %}"
  ),
  "tojson": "{{ messages[0] | tojson }}",
}

TOOL = {
  "type": "function",
  "function": {
    "name": "weather",
    "description": "The weather, in °C & <words>",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
  },
}
user = lambda text, **more: {"role": "user", "content": text} | more
assistant = lambda text, **more: {"role": "assistant", "content": text} | more
system = lambda text: {"role": "system", "content": text}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CONVERSATIONS = {
  "one": {"messages": [user("hé <ok>")]},
  "system": {"messages": [system(" Be brief. "), user("hi\nthere ")]},
  "history": {"messages": [user("hi", name="Ann"), assistant(" yes "), user("go on & on")]},
  "long": {"messages": [user("1"), assistant("2"), user("3"), assistant("4"), user("5")]},
  "finished": {
    "messages": [user("hi"), assistant("<think>\nhm</think>\n\nyes")],
    "add_generation_prompt": False,
  },
  "tools": {
    "messages": [
      system("Use tools."),
      user("weather?"),
      assistant("", tool_calls=[CALL]),
      {"role": "tool", "content": '{"t": 3}'},
      {"role": "tool", "content": "3 °C"},
    ],
    "tools": [TOOL, TOOL],
  },
  "documents": {
    "messages": [user("which?")],
    "documents": [{"title": "a", "text": "b"}, {"title": "c", "text": "d"}],
  },
  "no_thinking": {"messages": [user("quick")], "enable_thinking": False},
  "twice_the_same": {"messages": [user("a"), user("b")]},
}


def without_date(text: str) -> str:
  """The text with today's date, as the templates write it, made the same on every day."""
  now = datetime.datetime.now()
  for form in ("%Y-%m-%d", "%d %b %Y"):
    text = text.replace(now.strftime(form), TODAY)
  return text


def write() -> None:
  """Renders everything with transformers; where it raises, the text is null."""
  import transformers
  from transformers.utils.chat_template_utils import render_jinja_template

  texts: dict[str, dict[str, str | None]] = {}
  for name, template in TEMPLATES.items():
    for which, conversation in CONVERSATIONS.items():
      values = {"add_generation_prompt": True} | NAMES | conversation
      messages = values.pop("messages")
      try:
        (text,), _ = render_jinja_template([messages], chat_template=template, **values)
      except Exception:
        text = None
      texts.setdefault(name, {})[which] = None if text is None else without_date(text)
  golden = {"made_with": f"transformers {transformers.__version__}", "texts": texts}
  GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  write()
