"""Answers that try to become more than text: each is shown as it is, nothing runs, nothing is fetched, nothing hides."""

import re

import pytest

from jaxrlhf.data.records import Message
from jaxrlhf.labelling.pairs import make_pair

HOSTILE = {
    "script": "<script>hit('script')</script>",
    "script-split": "<scr<script>ipt>hit(1)</scr</script>ipt>",
    "script-file": "<script src=//evil.example/x.js></script>",
    "image": "<img src=x onerror=hit(1)>",
    "image-quoted": "\"><img src=x onerror=\"hit(1)\">",
    "svg": "<svg onload=hit(1)><script>hit(1)</script></svg>",
    "svg-animate": "<svg><animate onbegin=hit(1) attributeName=x dur=1s>",
    "math": "<math><mi xlink:href='javascript:hit(1)'>x</mi></math>",
    "frame": "<iframe srcdoc='<script>parent.hit(1)</script>'></iframe>",
    "frame-address": "<iframe src='javascript:parent.hit(1)'></iframe>",
    "object": "<object data='data:text/html,<script>hit(1)</script>'></object>",
    "embed": "<embed src='javascript:hit(1)'>",
    "details": "<details open ontoggle=hit(1)>",
    "input": "<input autofocus onfocus=hit(1)>",
    "form": "<form action='/api/label' method=post><button>Left is better</button></form>",
    "style": "<style>*{display:none!important}</style>",
    "style-attribute": "<div style='position:fixed;inset:0;background:url(//evil.example)'>over</div>",
    "base": "<base href='//evil.example/'>",
    "refresh": "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "link": "<link rel=stylesheet href=//evil.example/x.css>",
    "template": "<template><script>hit(1)</script></template><noscript><p title='</noscript><img src=x onerror=hit(1)>'>",
    "comment": "<!--><img src=x onerror=hit(1)>-->",
    "textarea": "</textarea></title></script><script>hit(1)</script>",
    "markdown-link": "[click me](javascript:hit(1)) and <javascript:hit(1)>",
    "markdown-image": "![x](//evil.example/x.png) ![x](x\"onerror=\"hit(1))",
    "markdown-reference": "[a]\n\n[a]: javascript:hit(1) \"title\"",
    "markdown-code": "```html onload=hit(1)\n<script>hit(1)</script>\n```\n`<img src=x onerror=hit(1)>`",
    "markdown-nest": "**<img src=x onerror=hit(1)>** *<b onmouseover=hit(1)>b</b>*\n> <script>hit(1)</script>",
    "markdown-heading": "# <svg onload=hit(1)>\n1. <script>hit(1)</script>\n- <img src=x onerror=hit(1)>",
    "templates": "{{constructor.constructor('hit(1)')()}} ${hit(1)} <%= hit(1) %>",
    "entities": "&lt;script&gt;hit(1)&lt;/script&gt; &#60;img src=x onerror=hit(1)&#62;",
    "prototype": "__proto__ constructor toString hasOwnProperty",
    "override": "safe \u202egpj.exe\u202c and \u2066isolated\u2069 and \u202aembedded",
    "half": "half \ud83d of a pair, \ude00 the other, whole \U0001f600",
    "zero": "zero \0 bell \a escape \x1b[31m delete \x7f next \x85 separators \u2028\u2029 end",
    "zalgo": "Z" + "\u0301\u0316\u0334" * 200 + "algo",
    "long": "x" * 1_000_000,
    "long-words": "word " * 200_000,
    "stars": "*" * 30_000 + "a" + "`" * 30_000,
    "lines": "\n".join("- " * 3 for _ in range(10_000)),
}  # fmt: skip


def shown_as(text):
    """The letters of a text, with what cannot be seen by its name, and without the signs of Markdown."""
    hidden = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\ud800-\udfff]"
    named = re.sub(hidden, lambda found: f"U+{ord(found[0]):04X}", text)
    # The number of a list's item is drawn by the browser, and is no text of the page.
    return re.sub(r"[\s*`#>-]", "", re.sub(r"(?m)^\d+\. ", "", named))


def test_there_are_enough():
    assert len(HOSTILE) >= 30


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_text(person, serve, press, name):
    text = HOSTILE[name]
    said = (Message(text[:200], text), Message("user", text[:5000]))
    pairs = [
        make_pair("people", text[:5000], text, f"other {text[:5000]}"),
        make_pair("people", said[:1], said, (Message("assistant", "harmless"),)),
    ]
    queue, address = serve(pairs)
    someone = person()
    tab = someone.open(address)
    tab.evaluate("() => { window.hits = []; window.hit = (what) => window.hits.push(what); }")
    elements = {"DIV", "P", "SPAN", "UL", "OL", "LI", "PRE", "CODE", "STRONG", "EM", "BLOCKQUOTE", "BUTTON", "MARK"}
    for _ in range(2):
        tab.wait_for_selector("#pair:not([hidden])")
        for key in ("m", "d", "m", "d"):
            tab.keyboard.press(key)
            found = tab.evaluate(
                "() => [...document.querySelectorAll('.text *')].map((each) => [each.tagName, each.getAttributeNames()])"
            )
            assert {tag for tag, _ in found} <= elements
            assert {name for _, names in found for name in names} <= {"class", "dir", "type", "start"}
        sides = [tab.evaluate("id => document.getElementById(id).textContent", side) for side in ("left", "right")]
        wanted = shown_as(text)
        # A text without an end is cut; the rest is there on request.
        assert any(wanted[:30_000] in shown_as(side) for side in sides)
        if len(text) > 40_000 and tab.locator("#left button, #right button").count():
            tab.locator("#left button, #right button").first.click()
            assert any(wanted[-100:] in shown_as(tab.inner_text(f"#{side}")) for side in ("left", "right"))
        assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth + 1")
        assert tab.is_visible("[data-choice=left]")
        press(tab, "s")
    assert tab.evaluate("() => window.hits") == []
    assert tab.title() == "Which answer is better?" and len(queue.votes()) == 2


def test_right_to_left_texts_run_so_and_do_not_leak(person, serve):
    pair = make_pair("people", "مرحبا بالعالم", "שלום עולם\n\nplain English", "\u202egnorw\n\nafter")
    _, address = serve([pair])
    tab = person().open(address)
    tab.wait_for_selector("#pair:not([hidden])")
    assert tab.evaluate("() => getComputedStyle(document.querySelector('#prompt p')).direction") == "rtl"
    hebrew = next(side for side in ("left", "right") if "שלום" in tab.inner_text(f"#{side}"))
    directions = tab.evaluate(
        "id => [...document.querySelectorAll(`#${id} p`)].map((each) => getComputedStyle(each).direction)", hebrew
    )
    assert directions == ["rtl", "ltr"]
    assert tab.locator(".control", has_text="U+202E").count() == 1


def test_the_page_cannot_be_framed(person, serve, some_pairs):
    _, address = serve(some_pairs(1))
    someone = person()
    someone.open(address)
    outer = someone.context.new_page()
    outer.route("http://evil.example/", lambda route: route.fulfill(
        content_type="text/html", body=f"<iframe src='{address}'></iframe>"))  # fmt: skip
    outer.goto("http://evil.example/")
    outer.wait_for_timeout(500)
    assert all("Which answer" not in frame.content() for frame in outer.frames if frame != outer.main_frame)


def test_another_site_cannot_label(person, serve, some_pairs):
    queue, address = serve(some_pairs(1))
    someone = person()
    tab = someone.open(address)
    tab.wait_for_selector("#pair:not([hidden])")
    host = address.split("/?")[0]
    outer = someone.context.new_page()
    outer.route("http://evil.example/", lambda route: route.fulfill(content_type="text/html", body="<p>evil</p>"))
    outer.goto("http://evil.example/")
    attack = """async (host) => {
        const lease = "x".repeat(16), body = JSON.stringify({ tab: "1", lease, choice: "left" });
        const tries = [
            fetch(`${host}/api/next`, { method: "POST", mode: "no-cors", credentials: "include", body }),
            fetch(`${host}/api/next`, { method: "POST", credentials: "include", body,
                                        headers: { "content-type": "application/json" } }),
            fetch(`${host}/`, { credentials: "include" }),
        ];
        const read = [];
        for (const each of await Promise.allSettled(tries))
            if (each.status === "fulfilled" && each.value.type !== "opaque") read.push(await each.value.text());
        return read;
    }"""
    assert outer.evaluate(attack, host) == []
    assert len(queue.store.leases()) == 1
