#!/usr/bin/python3
"""Renders chat templates with jinja2, set up as transformers sets it up (utils/chat_template_utils.py), as the oracle of
router/chat. Needs python3-jinja2.

    chat_template_oracle.py            writes tests/data/chat/cases.json, which test_chat_template.c replays
    chat_template_oracle.py --check    renders the committed cases again and fails where jinja2 says something else

A case: name, template (or file, in templates/), variables (index), and expected, or error: a text that the message contains.
"""
import functools
import json
import pathlib
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CASES = ROOT / "tests/data/chat/cases.json"
TEMPLATES = ROOT / "tests/data/chat/templates"


class GenerationBlock(jinja2.ext.Extension):
    """transformers' AssistantTracker, less the tracking."""

    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller):
        return caller()


class Raised(jinja2.exceptions.TemplateError):
    """What the template itself refuses by raise_exception."""


def raise_exception(message):
    raise Raised(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format):
    import datetime

    return datetime.datetime.now().strftime(format)


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


@functools.cache
def parsed(template):
    return environment().from_string(template)


def render(template, variables):
    """(text, None, "") or (None, jinja2's message, what our message must contain too)."""
    try:
        return parsed(template).render(**{"tools": None, "documents": None, **variables}), None, ""
    except Raised as error:
        return None, str(error), str(error)
    except Exception as error:  # every failure of a template is a case's result; its wording is jinja2's and Python's own
        return None, str(error), ""


def small_cases():
    """(group, template or [templates], variables)."""
    v = {
        "x": 3, "y": 2.5, "s": "Hello, Wörld", "e": "", "n": None, "t": True, "f": False, "l": [3, 1, 2], "z": [],
        "d": {"b": 1, "a": "two", "items": 5}, "words": ["pear", "Apple", "fig", "apple"], "text": "one two  three\nfour",
        "users": [{"name": "Ann", "age": 30, "on": True}, {"name": "bob", "age": 25, "on": False}, {"name": "Cy", "age": 30}],
        "nested": {"k": {"deep": [1, {"z": "end"}]}}, "odd": "a'b\"c\\d\n\te\u00a0\u200b€😀\u0007", "float": 1e22,
    }
    e = {}  # expressions, each printed
    e["literals"] = "1; 1.0; 1e3; 1_000; 0x1F; 0b101; 0o17; 'a'; \"b\"; 'a' 'b'; true; false; none; True; None; []; [1, 'a', none]; (1,); (1, 2); (); {}; {'a': 1, 'b': [2]}; 1.5e-7; 1e16; 123456789.125; 0.1 + 0.2; 1e22; 'x\\ny'; '\\u20ac\\x41\\101\\t\\\\ \\q'; {'a': 1,}; [1, 2,]".split("; ")
    e["arithmetic"] = "1 + 2; 7 - 10; 6 * 7; 7 / 2; 8 / 2; 7 // 2; -7 // 2; 7 % 3; -7 % 3; 7 % -3; 2 ** 10; 2 ** -1; 1.5 + 1; 7.5 // 2; -7.5 % 2; -x; +x; - -x; 2 + 3 * 4; (2 + 3) * 4; 'a' + 'b'; 'ab' * 3; [1] + [2]; [0] * 3; (1,) + (2,); true + 1; x ~ y ~ s ~ n ~ t ~ l; 1 ~ 2 + 3; 2 ** 3 ** 2; -2 ** 2; 1 / 0; 'a' + 1; 1 + 'a'; s + n; missing + 1; 'a' - 'b'; -s; 1 // 0; 1 % 0; 3 * 'ab'".split("; ")
    e["comparison"] = "1 == 1.0; 1 == true; 'a' == 'a'; 'a' != 'b'; [1, 2] == [1, 2]; (1,) == [1]; {'a': 1} == {'a': 1.0}; none == false; 1 < 2; 2 <= 2; 'a' < 'b'; 'Z' < 'a'; 'é' > 'z'; [1, 2] < [1, 3]; 1 < 2 < 3; 1 < 3 < 2; x > 2 and y < 3; not x; not z; not e; 1 in l; 9 in l; 9 not in l; 'ell' in s; 'b' in d; 5 in d; not 1 in l; missing == missing2; missing == none; missing in l; 1 in missing; 1 in 'abc'; 1 in 5; 1 < 'a'; none < 1; missing < 1; n is none and not n; t and f or t; '' or 'x'; 0 or z or 'last'; 1 and 'two'".split("; ")
    e["access"] = "d.a; d['a']; d.b; d['items']; d.missing; d['missing']; nested.k.deep[1].z; nested['k']['deep'][0]; l[0]; l[-1]; l[10]; l[-10]; s[0]; s[-1]; s[7]; s[99]; l.0; nested.missing.more; missing.x; missing['x']; none.x; n.x; s.nope; s[1:4]; s[:-3]; s[-3:]; s[::-1]; s[::2]; l[1:]; l[:1]; l[::-1]; l[5:2]; s[8:2:-2]; s[20:]; l[:none]; l[t:]; (1, 2, 3)[1:]; 'añb'[1]; 'añb'[1:]; d[1:2]; l['x']; l['0']; s['upper'](); x.y; x[0]; l[1:2:0]".split("; ")
    e["ternary"] = "1 if t else 2; 1 if f else 2; 1 if f; 'a' if f else 'b' if f else 'c'; (1 if t else 2) + 1; 1 if missing else 2; (x if t)".split("; ")
    e["tests"] = "x is defined; missing is defined; missing is undefined; missing is not defined; n is none; x is none; s is string; d is mapping; l is mapping; l is iterable; s is iterable; x is iterable; missing is iterable; l is sequence; d is sequence; missing is sequence; x is number; t is number; y is number; x is integer; t is integer; y is float; t is boolean; x is boolean; t is true; f is false; x is true; x is odd; x is even; 4 is even; x is divisibleby 3; x is divisibleby(2); x is eq 3; x is equalto 4; x is ne 3; x is gt 2; x is lt(2); x is ge 3; x is le 3; x is in l; x is in [1]; x is sameas 3; n is sameas none; 'a' is lower; 'A' is upper; '1' is upper; range is callable; x is callable; not x is defined; x is not none and t; x is string or t; d.a is defined; d.zz is defined; missing.a is defined; x is defined and x == 3; l is not string; 'a' is in 'abc'".split("; ")
    e["filters"] = "s | upper; s | lower; s | length; l | length; d | length; missing | length; x | length; ' a ' | trim; 'xxaxx' | trim('x'); 'hello world-foo (bar)' | title; \"it's\" | title; 'hELLO wORLD' | capitalize; l | first; l | last; z | first; s | first; s | last; z | last; d | first; l | join; l | join(', '); words | join('|'); users | join(', ', attribute='name'); missing | default('dflt'); e | default('dflt'); e | default('dflt', true); n | default('dflt'); n | d('x', boolean=true); missing | d; missing.x | default(1); x | string; 3.7 | int; '42' | int; ' 42 ' | int; 'x' | int; 'x' | int(7); '0x1A' | int(base=16); '3.9' | int; n | int; t | int; '1_000' | int; '2.5' | float; 'x' | float; x | float; n | float(1.5); missing | int; -3 | abs; (-3) | abs; (-2.5) | abs; 2.5 | round; 3.5 | round; 2.345 | round(2); 2.31 | round(1, 'ceil'); 2.39 | round(1, 'floor'); 5 | round; s | replace('l', 'L'); s | replace('l', 'L', 1); 'aaa' | replace('', '-'); s | replace('zz', ''); '<a href=\"x\">&\\'' | escape; '<b>' | e; '<b>' | safe; x | safe; s | list; d | list; l | reverse | list; s | reverse; l | sort; l | sort(reverse=true); words | sort; words | sort(case_sensitive=true); users | sort(attribute='age') | map(attribute='name') | list; users | sort(attribute='age', reverse=true) | map(attribute='name') | list; [1, 'a'] | sort; d | dictsort; {'B': 2, 'a': 3, 'c': 1} | dictsort; {'B': 2, 'a': 3, 'c': 1} | dictsort(true); {'B': 2, 'a': 3, 'c': 1} | dictsort(by='value'); {'B': 2, 'a': 3} | dictsort(reverse=true); words | unique | list; [1, 1.0, true, 2] | unique | list; words | unique(true) | list; l | min; l | max; words | min; users | max(attribute='age'); z | min; l | sum; users | sum('age'); users | sum(attribute='age', start=100); d | items | list; missing | items | list; l | items | list; [1, 2, 3, 4, 5] | batch(2) | list; [1, 2, 3] | batch(2, 'x') | list; l | map('string') | list; words | map('upper') | join(' '); words | map('replace', 'p', 'P') | list; users | map(attribute='on') | list; users | map(attribute='on', default='?') | list; nested | map('length') | list; l | select('odd') | list; l | reject('odd') | list; l | select('gt', 1) | list; z | select | list; [0, 1, '', 'a'] | select | list; [0, 1, '', 'a'] | reject | list; users | selectattr('on') | map(attribute='name') | list; users | selectattr('age', 'equalto', 30) | map(attribute='name') | list; users | rejectattr('age', 'eq', 30) | map(attribute='name') | list; users | selectattr('on', 'defined') | list | length; users | selectattr('name', 'in', ['Ann', 'Cy']) | list | length; n | map('upper') | list; [[1, 2], [3, 4]] | map('first') | list; [[1, 2], [3, 4]] | map(attribute=1) | list; users | map(attribute='name.0') | list; n | list; x | join; text | indent; text | indent(2, true); 'a\\n\\nb\\n' | indent(2); 'a\\n\\nb\\n' | indent(2, blank=true); text | indent('> '); l | tojson | upper; -x | abs; s | upper | lower | title; (s ~ '!') | upper; s ~ '!' | upper; missing | upper; n | upper; missing | trim; l | first | string; not l | length; missing | join; missing | first; missing | list; n | length; l | string | length".split("; ")
    e["tojson"] = "d | tojson; l | tojson; s | tojson; odd | tojson; n | tojson; t | tojson; y | tojson; float | tojson; nested | tojson(indent=2); nested | tojson(indent=4); z | tojson(indent=2); {} | tojson(indent=2); users | tojson; missing | tojson; s | tojson(ensure_ascii=true); '😀' | tojson(true); {'b': 1, 'a': {'d': 1, 'c': 2}} | tojson(sort_keys=true); d | tojson(separators=(',', ':')); nested | tojson(indent=1, separators=(';', '=')); {1: 2, none: 3, true: 4} | tojson; (1, 2) | tojson; '</script>' | tojson; range(3) | list | tojson; l | tojson(indent='--'); 1e-7 | tojson; 100000000000000000000.0 | tojson".split("; ")
    e["methods"] = "s.upper(); s.lower(); s.title(); 'they\\'re bill\\'s'.title(); s.capitalize(); '  a b '.strip(); 'xxaxx'.strip('x'); 'xyaxy'.lstrip('yx'); 'abc  '.rstrip(); 'abc'.rstrip('c'); s.startswith('Hell'); s.startswith(('x', 'H')); s.endswith('d'); s.endswith(('x', 'y')); text.split(); text.split(' '); text.split('\\n'); text.split(' ', 1); text.split(maxsplit=1); text.split(none, 2); ' a  b '.split(); 'a,b,c'.split(',')[-1]; 'a,b,c'.rsplit(',', 1); 'a,b,c'.split(',', 0); ''.split(); ''.split(','); 'a\\nb\\r\\nc\\n'.splitlines(); 'a\\nb\\n'.splitlines(true); s.replace('l', 'L'); s.replace('l', 'L', 1); s.find('l'); s.find('zz'); 'ñandú'.find('d'); s.count('l'); 'aaa'.count('aa'); s.isdigit(); '123'.isdigit(); 'abc'.isalpha(); 'ab1'.isalnum(); '  '.isspace(); ''.isdigit(); ', '.join(words); ''.join(['a', 'b']); ','.join([1]); 'pre-x'.removeprefix('pre-'); 'x.py'.removesuffix('.py'); l.index(1); l.count(3); l.index(9); d.get('a'); d.get('zz'); d.get('zz', 'dflt'); d.keys() | list; d.values() | list; nested.items() | list; {'a': 1}.items() | list; l.append(4); d.update({'a': 1}); d.pop('a'); s.nope(); x.nope(); missing(); x(); s.split(''); s.strip(1); d['get']('a'); nested.k.keys() | first; s.__class__; d.__class__; ÷".split("; ")[:-1]
    e["globals"] = "range(3) | list; range(1, 4) | list; range(10, 0, -3) | list; range(0) | list; range(5)[2]; range(200000); dict(a=1, b='x'); dict({'a': 1}, b=2); namespace(a=1).a; namespace({'a': 2}).a; namespace().zz; strftime_now('%Y') | length; strftime_now('%d %b %Y') | length; raise_exception('no such luck'); raise_exception(s)".split("; ")
    e["repr"] = "[s]; [odd]; odd; [e, n, t, y, float]; d; {'k': \"it's\"}; ['it\\'s \"q\"']; [missing]; [1.0, 100.0, 1e100, 1e-5, 0.0001, 123456.789]; (1, ('a', [2.0])); ['\\x7f', '\\x00']; ['\\\\']; words; ''; [[]]; 1e15; 1e16; 12345678901234567.0".split("; ")
    cases = [(group, "{{ " + expression + " }}", v) for group, expressions in e.items() for expression in expressions]

    statements = {
        "for": [
            "{% for i in l %}{{ i }},{% endfor %}",
            "{% for i in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }};{% endfor %}",
            "{% for i in l %}{{ loop.previtem }}<{{ i }}>{{ loop.nextitem }} {% endfor %}",
            "{% for i in l %}{{ loop.previtem is defined }}{{ loop.nextitem is defined }} {% endfor %}",
            "{% for i in z %}{{ i }}{% else %}none{% endfor %}",
            "{% for i in missing %}{{ i }}{% else %}none{% endfor %}",
            "{% for i in n %}{{ i }}{% endfor %}",
            "{% for i in 5 %}{{ i }}{% endfor %}",
            "{% for k in d %}{{ k }} {% endfor %}",
            "{% for k, v in d.items() %}{{ k }}={{ v }} {% endfor %}",
            "{% for k, v in nested | items %}{{ k }}={{ v }} {% endfor %}",
            "{% for (a, b) in [(1, 2), (3, 4)] %}{{ a }}{{ b }} {% endfor %}",
            "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
            "{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}",
            "{% for c in 'añ😀' %}[{{ c }}]{% endfor %}",
            "{% for i in l if i > 1 %}{{ i }}{{ loop.index }}{{ loop.last }}{{ loop.length }} {% endfor %}",
            "{% for i in l if i > 9 %}{{ i }}{% else %}no{% endfor %}",
            "{% set ns = namespace(stop=false) %}{% for i in [1, 2, 3, 4] if not ns.stop %}{{ i }}{% if i == 2 %}{% set ns.stop = true %}{% endif %}{% endfor %}",
            "{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "{% for i in l %}{% for j in l %}{{ loop.index }}{{ i }}{{ j }}{% if j == 1 %}{% break %}{% endif %}{% endfor %};{% endfor %}",
            "{% for i in l %}{% set outer = loop %}{% for j in [1] %}{{ outer.index }}{% endfor %}{% endfor %}",
            "{% for i in l %}{% set x = i %}{{ x }}{% endfor %}{{ x }}",
            "{% for i in l %}{{ x }}{% set x = x + i %}{{ x }} {% endfor %}{{ x }}",
            "{% for x in l %}{{ x }}{% endfor %}{{ x }}",
            "{% for i in l %}{% if loop.first %}{% set seen = i %}{% endif %}{{ seen }}.{% endfor %}",
            "{% for i in [1] %}a{% break %}b{% endfor %}c",
            "{% for i in 1, 2 %}{{ i }}{% endfor %}",
            "{% for m in l[1:] + [9] %}{{ m }}{% endfor %}",
            "{% for m in l | reverse %}{{ m }}{% endfor %}",
            "{% for m in (l if t else z) %}{{ m }}{% endfor %}",
            "{{ loop }}",
            "{% for i in l %}{{ loop.depth }}{{ loop.nope }}{% endfor %}",
        ],
        "if": [
            "{% if t %}a{% endif %}", "{% if f %}a{% else %}b{% endif %}", "{% if f %}a{% elif x == 3 %}b{% else %}c{% endif %}",
            "{% if f %}a{% elif f %}b{% elif t %}c{% endif %}", "{% if missing %}a{% endif %}", "{% if t %}{% set q = 1 %}{% endif %}{{ q }}",
            "{% if f %}{% set x = 1 %}{% endif %}{{ x }}", "{% if not missing is defined %}{% set missing = 'set' %}{% endif %}{{ missing }}",
            "{% if t %}{% if f %}a{% else %}b{% endif %}{% endif %}", "{% if s and l and d %}all{% endif %}",
            "{% if (x == 3) == t %}yes{% endif %}", "{% if x in [1, 2, 3] and s is string %}yes{% endif %}",
            "{% if d.get('zz') %}a{% elif d['a'] %}b{% endif %}",
        ],
        "set": [
            "{% set a = 1 %}{{ a }}", "{% set a, b = 1, 2 %}{{ b }}{{ a }}", "{% set a = 1, 2 %}{{ a }}", "{% set (a, b) = (1, 2) %}{{ a }}",
            "{% set a %}text {{ x }}{% endset %}[{{ a }}]", "{% set a | upper %}text {{ x }}{% endset %}[{{ a }}]",
            "{% set a | trim | replace('t', 'T') %}  text {% endset %}[{{ a }}]",
            "{% set ns = namespace(a=1, b='x') %}{% set ns.a = ns.a + 1 %}{% set ns.c = 5 %}{{ ns.a }}{{ ns.b }}{{ ns.c }}{{ ns.d }}",
            "{% set ns = namespace(n=0) %}{% for i in l %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}{{ ns['n'] }}",
            "{% set ns = namespace() %}{% set ns.t %}block{% endset %}{{ ns.t }}", "{% set d.a = 1 %}", "{% set missing.a = 1 %}",
            "{% set x = x + 1 %}{{ x }}", "{% set x = none %}{{ x }}", "{% set a = [1] %}{% set b = a %}{{ a == b }}",
            "{% set a = 'x' if t else 'y' %}{{ a }}", "{% set a = b = 1 %}", "{% set 1 = 2 %}", "{% set a %}x", "{% set a, b = [1] %}",
            "{% set ns = namespace(x=l) %}{% set ns.x = ns.x + [4] %}{{ ns.x }}{{ l }}",
        ],
        "macro": [
            "{% macro m() %}hi{% endmacro %}{{ m() }}", "{% macro m(a, b=2) %}{{ a }}-{{ b }}{% endmacro %}{{ m(1) }} {{ m(1, 3) }} {{ m(b=4, a=5) }}",
            "{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m() }}", "{% macro m(a) %}{{ a is defined }}{% endmacro %}{{ m() }}",
            "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(q=2) }}",
            "{% macro m(a, b=a ~ '!') %}{{ b }}{% endmacro %}{{ m('x') }}", "{% macro m() %}{{ x }}{% endmacro %}{% set x = 9 %}{{ m() }}",
            "{% macro f(k) %}{% if k > 0 %}{{ k }}{{ f(k - 1) }}{% endif %}{% endmacro %}{{ f(5) }}",
            "{% macro m(a) %}{% set x = a %}{{ x }}{% endmacro %}{{ m(1) }}{{ x }}", "{% macro m() %} a {% endmacro %}[{{ m() | trim }}]{{ m() | length }}",
            "{% macro m(a) %}<{{ caller() }}|{{ a }}>{% endmacro %}{% call m(1) %}body {{ x }}{% endcall %}",
            "{% macro m() %}{{ caller(1) }}{{ caller(2) }}{% endmacro %}{% call(k) m() %}[{{ k }}]{% endcall %}",
            "{% macro m(l) %}{% for i in l %}{{ i }}{% if not loop.last %},{% endif %}{% endfor %}{% endmacro %}{{ m([1, 2]) }}",
            "{% macro m() %}{{ missing.a }}{% endmacro %}ok", "{% for i in l %}{{ later(i) }}{% endfor %}{% macro later(i) %}{{ i }}{% endmacro %}",
            "{% macro outer() %}{% macro inner() %}in{% endmacro %}{{ inner() }}{% endmacro %}{{ outer() }}", "{{ m.name }}{% macro m() %}{% endmacro %}",
            "{% macro m() %}{% endmacro %}{{ m.name }}", "{% macro r(k) %}{{ r(k + 1) }}{% endmacro %}{{ r(0) }}",
        ],
        "blocks": [
            "{% filter upper %}abc {{ s }}{% endfilter %}", "{% filter trim | replace('a', 'b') %} a {% endfilter %}",
            "{% with a = 1, b = x %}{{ a }}{{ b }}{% endwith %}{{ a }}", "{% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q }}",
            "{% generation %}text {{ x }}{% endgeneration %}", "{% for i in l %}{% generation %}{{ i }}{% endgeneration %}{% endfor %}",
            "{% raw %}{{ x }} {% if %}{# #}{% endraw %}!", "{%- raw -%}  {{ x }}  {%- endraw -%} y", "a\n  {% raw %}\n b\n  {% endraw %}\nc",
            "{# comment {{ x }} #}a{#- b -#} c", "a {#- x #} b", "a\n  {# x #}\nb", "{% print x %}", "{# multi\nline #}\n{{ x }}",
        ],
        "space": [
            "a\n{% if t %}\nb\n{% endif %}\nc\n", "a\n  {% if t %}  \n  b\n  {% endif %}\nc\n\n", "a \n {%- if t -%} \n b \n {%- endif -%} \n c",
            "a\n  {%+ if t +%}\nb{%+ endif %}\nc", "  {% if t %}x{% endif %}", "x  {% if t %}y{% endif %}", "{{ x }}\n{{ x }}\n", " {{- x -}} \n y", "a {{ x -}} b {{- x }} c",
            "  {{ x }}\n  {{ x }}", "{% if t %}\r\nwin\r\n{% endif %}\r\nend\r\n", "a\rb", "{% for i in l %}\n  {{ i }}\n{% endfor %}\n", "\n\n", "", "\n",
            "{% if t -%}\n\n   x\n{%- endif %}\n", "a\u00a0{%- if t %}b{% endif %}", "{{'a'}}{{ 'b' }}{{\n'c'\n}}", "{%if t%}a{%endif%}", "{{ '%}' }}{{ '}}' }}", "{{ {'a': {'b': 1}}['a']['b'] }}", "{{ {'a': {'b': 1}} }}",
            "{{ '{{' }} {{ \"{%\" }}", "a { b } c {d} % # }}", "{{ x }}}", "{% set a = 1 %}\n\n{% set b = 2 %}\n{{ a }}{{ b }}", "\t{% if t %}\ta\t{% endif %}\t\n", "{%-if t-%} a {%-endif-%}", "{{- 'x' -}}", "{{-1}}", "{{ -1}}", "{{+1}}",
        ],
        "errors": [
            "{{ ", "{% if t %}", "{% endif %}", "{% for i in l %}", "{{ x", "{% if %}a{% endif %}", "{{ 1 + }}", "{{ (1 }}", "{{ 1) }}", "{{ [1 }}", "{{ 'abc }}", "{% bogus %}", "{# abc",
            "{% raw %}abc", "{{ x | nofilter }}", "{{ x is notest }}", "{{ x. }}", "{{ x | }}", "{{ x is }}", "{% for in l %}{% endfor %}", "{% for i l %}{% endfor %}", "{% set %}", "{% macro %}{% endmacro %}",
            "{% break %}", "{{ }}", "{{ x y }}", "{{ 1 2 }}", "{{ @ }}", "{{ x ! y }}", "{% if t %}{% else %}{% else %}{% endif %}", "{% macro m(a=1, b) %}{% endmacro %}", "{{ f(a=1, 2) }}", "{{ {1} }}", "{% if t %}a{% endfor %}",
            "{% endset %}", "{{ a..b }}", "{{ not }}", "{{ x is defined is none }}", "{% call x %}{% endcall %}", "{{ x[1 }}",
        ],
    }
    for group, templates in statements.items():
        cases += [(group, template, v) for template in templates]
    return cases


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "Name"}, "days": {"type": ["integer", "null"], "enum": [1, 2]}}, "required": ["town"]},
    },
}


def conversations():
    user, assistant = {"role": "user", "content": " Hi! \n"}, {"role": "assistant", "content": "Hello <b>you</b>."}
    system = {"role": "system", "content": "Be brief."}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call12345", "function": {"name": "get_weather", "arguments": {"town": "Zürich", "days": 2}}}]}
    result = {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "{\"sky\": \"blue\"}"}
    thought = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nDone.", "reasoning_content": "well"}
    parts = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    yield "user", {"messages": [user]}
    yield "turns", {"messages": [system, user, assistant, {"role": "user", "content": "Bye 😀"}]}
    yield "no_prompt", {"messages": [user, assistant], "add_generation_prompt": False}
    yield "tools", {"messages": [system, user, call, result], "tools": [TOOL]}
    yield "tools_turns", {"messages": [user, call, result, assistant, user], "tools": [TOOL, TOOL]}
    yield "thinking", {"messages": [user, thought, user], "enable_thinking": True}
    yield "no_thinking", {"messages": [user], "enable_thinking": False, "reasoning_effort": "high", "thinking": True}
    yield "parts", {"messages": [parts]}
    yield "two_users", {"messages": [user, user]}
    yield "empty", {"messages": []}
    yield "bad_role", {"messages": [{"role": "wizard", "content": "abracadabra"}]}
    yield "null_content", {"messages": [user, {"role": "assistant", "content": None}]}


def family_cases():
    """The demo model's template and hand-written ones in the shape of the large families' (templates/*.jinja)."""
    demo = json.loads((ROOT / "models/demo/tokenizer_config.json").read_text())["chat_template"]
    sources = [("demo", demo, None)] + [(path.stem, path.read_text(), path.name) for path in sorted(TEMPLATES.glob("*.jinja"))]
    for name, source, file in sources:
        for conversation, variables in conversations():
            base = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", "date_string": "26 Jul 2024", "strftime_fixed": "2025-06-28"}
            yield name + "/" + conversation, source, file, {**base, **variables}


def make_cases():
    variables, cases = [], []
    named = [(f"{group}/{i}", template, None, v) for i, (group, template, v) in enumerate(small_cases())]
    for name, template, file, v in named + list(family_cases()):
        if v not in variables:
            variables.append(v)
        text, error, part = render(template, v)
        case = {"name": name, **({"file": file} if file else {"template": template}), "variables": variables.index(v)}
        cases.append({**case, "expected": text} if error is None else {**case, "error": part, "jinja2_says": error})
    return {"jinja2": jinja2.__version__, "variables": variables, "cases": cases}


def check():
    data = json.loads(CASES.read_text())
    wrong = 0
    for case in data["cases"]:
        template = case["template"] if "template" in case else (TEMPLATES / case["file"]).read_text()
        text, error, _ = render(template, data["variables"][case["variables"]])
        if text != case.get("expected") or (error is None) == ("error" in case):
            wrong += 1
            print("differs:", case["name"], repr(text), error)
    print(f"{len(data['cases'])} cases, {wrong} differ")
    return 1 if wrong or not data["cases"] else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    CASES.write_text(json.dumps(make_cases(), ensure_ascii=True, indent=0) + "\n")
    print(CASES)
