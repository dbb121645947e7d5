"""Asking: pictures go in, an answer is written, and it can be stopped and asked again."""

import base64

import pytest
from driver import SHAPES, STAR
from playwright.sync_api import expect


def parts(body, turn=-1):
    return body["messages"][turn]["content"]


def uri(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_a_question_with_pictures_is_sent_as_it_was_put(page, stub):
    page.add(STAR, SHAPES)
    answer = page.asked("say a red star")
    expect(answer.locator(".markdown")).to_have_text("a red star")
    (body,) = stub.bodies
    detail = {"detail": "auto"}
    assert parts(body) == [
        {"type": "image_url", "image_url": {"url": uri(STAR), **detail}},
        {"type": "image_url", "image_url": {"url": uri(SHAPES), **detail}},
        {"type": "text", "text": "say a red star"},
    ]
    assert body["model"] == "stub-model"
    assert body["stream"] is True
    expect(page.questions.locator("img")).to_have_count(2)
    expect(page.question).to_have_value("")


def test_pictures_are_dropped_pasted_and_taken_out(page, stub):
    page.drop(".log", page.files(STAR))
    page.paste(page.question, page.files(SHAPES))
    thumbnails = page.page.get_by_label("Pictures to send").get_by_role("img")
    expect(thumbnails).to_have_count(2)
    assert thumbnails.last.evaluate("image => image.naturalWidth") > 0
    page.button("Remove red-star.png").click()
    page.asked("what is it?")
    urls = [p["image_url"]["url"] for p in parts(stub.bodies[0]) if "image_url" in p]
    assert urls == [uri(SHAPES)]


def test_a_file_that_is_dropped_beside_the_chat_does_not_replace_the_page(page):
    files = page.files(STAR)
    for kind in ("dragover", "drop"):
        let_go = page.page.locator("aside").evaluate(
            """(place, [kind, dataTransfer]) => place.dispatchEvent(
                new DragEvent(kind, {dataTransfer, bubbles: true, cancelable: true}))""",
            [kind, files],
        )
        assert not let_go, kind


def test_a_dropped_file_that_is_no_picture_is_named(page):
    page.drop(".log", page.files(__file__, kind="text/plain"))
    expect(page.page.get_by_role("alert")).to_have_text("test_ask.py is not a picture.")
    page.drop(".log", page.files(STAR))
    expect(page.page.get_by_role("alert")).to_have_count(0)


def test_pasted_text_goes_into_the_question(page, context):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.page.evaluate("navigator.clipboard.writeText('a plain text')")
    page.question.press("Control+v")
    expect(page.question).to_have_value("a plain text")


def test_a_picture_that_the_browser_cannot_show_is_sent_all_the_same(page, stub):
    page.drop(".log", page.files(__file__, kind="image/heic"))
    expect(page.page.locator(".composer .unseen")).to_have_text("test_ask.py")
    page.asked("what is it?")
    assert parts(stub.bodies[0])[0]["image_url"]["url"].startswith(
        "data:image/heic;base64,"
    )


def test_an_answer_is_shown_while_it_is_written_and_can_be_stopped(page, stub):
    page.ask("count 1000")
    answer = page.answers.last
    expect(answer.locator(".markdown")).to_contain_text("0 1 2")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(page.button("Ask", exact=True)).to_have_count(0)
    page.button("Stop").click()
    page.settle(1)
    expect(answer).to_contain_text("Stopped.")
    stopped = answer.locator(".markdown").text_content()
    assert stopped.startswith("0 1 2")
    page.page.wait_for_timeout(300)
    assert answer.locator(".markdown").text_content() == stopped
    assert stub.left == ["count 1000"]
    # What was written is what the model is shown of it.
    page.asked("and now?", count=2)
    shown = stub.bodies[1]["messages"][1]
    assert shown == {"role": "assistant", "content": shown["content"]}
    assert shown["content"].strip() == stopped.strip()


def test_escape_stops_the_answer_but_not_from_a_dialog(page):
    page.ask("count 1000")
    expect(page.answers.last.locator(".markdown")).to_contain_text("0 1")
    page.button("Settings").click()
    page.page.keyboard.press("Escape")
    expect(page.page.get_by_role("dialog")).to_have_count(0)
    expect(page.answers.last).to_have_attribute("aria-busy", "true")
    page.question.press("Escape")
    expect(page.settle(1)).to_contain_text("Stopped.")


def test_shift_enter_begins_a_line(page, stub):
    page.question.fill("one")
    page.question.press("Shift+Enter")
    page.question.press_sequentially("two")
    page.question.press("Enter")
    page.settle(1)
    assert parts(stub.bodies[0])[-1]["text"] == "one\ntwo"


def test_nothing_is_asked_while_there_is_nothing_to_ask(page, stub):
    expect(page.button("Ask", exact=True)).to_be_disabled()
    page.question.press("Enter")
    page.ask("   ")
    assert stub.bodies == []


def test_the_last_question_is_asked_again(page, stub):
    page.asked("first")
    page.asked("second", count=2)
    expect(page.button("Retry")).to_have_count(1)
    page.button("Retry").click()
    page.settle(2)
    assert len(stub.bodies) == 3
    assert stub.bodies[2]["messages"] == stub.bodies[1]["messages"]


def test_a_question_is_changed_and_what_followed_goes(page, stub):
    page.add(STAR)
    page.asked("first")
    page.asked("second", count=2)
    page.button("Edit the question").first.click()
    field = page.page.get_by_label("The question, changed")
    expect(field).to_be_focused()
    field.fill("another")
    page.page.locator(".edit input[type=file]").set_input_files(str(SHAPES))
    page.button("Ask again").click()
    expect(page.settle(1)).to_contain_text("You said: another")
    messages = stub.bodies[2]["messages"]
    assert len(messages) == 1
    assert [p["type"] for p in messages[0]["content"]] == ["image_url"] * 2 + ["text"]


def test_a_change_is_given_up(page, stub):
    page.asked("first")
    page.button("Edit the question").click()
    page.page.get_by_label("The question, changed").fill("another")
    page.page.keyboard.press("Escape")
    expect(page.questions).to_have_text("first")
    assert len(stub.bodies) == 1


def test_earlier_turns_are_sent_along(page, stub):
    page.add(STAR)
    page.asked("say red")
    page.asked("and?", count=2)
    roles = [message["role"] for message in stub.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert stub.bodies[1]["messages"][1]["content"] == "red"
    assert parts(stub.bodies[1], 0)[0]["image_url"]["url"] == uri(STAR)


def test_tokens_and_times_stand_under_an_answer(page):
    answer = page.asked("say yes")
    expect(answer.locator(".cost")).to_have_text(
        "28 prompt tokens (16 of pictures) · first token after 0.25 s · 5 tokens, 230 per second"
    )


def test_what_the_model_cannot_do_is_said(page, stub):
    choice = page.page.get_by_label("Resolution")
    expect(choice.locator("option")).to_have_text(
        ["auto: 672", "low: 378", "high: 2x672"]
    )
    for answers, said in ((True, "takes no pictures"), (False, "answers no questions")):
        stub.abilities = {"answers": answers, "resolution": None}
        page.page.reload()
        expect(page.page.get_by_role("status")).to_contain_text(said)
    # Another server says nothing of it.
    stub.abilities = None
    page.page.reload()
    expect(choice.locator("option")).to_have_text(["auto", "low", "high"])


def test_an_answer_that_was_cut_says_so(page):
    expect(page.asked("long one")).to_contain_text("Cut at the longest answer")


def test_settings_are_part_of_the_request_and_stay(page, stub):
    page.button("Settings").click()
    dialog = page.page.get_by_role("dialog")
    dialog.get_by_label("System message").fill("Be short.")
    dialog.get_by_label("Temperature").fill("0.7")
    dialog.get_by_label("Top-p").fill("0.9")
    dialog.get_by_label("Seed").fill("11")
    dialog.get_by_label("Longest answer").fill("64")
    dialog.get_by_label("Stop before").fill("\\n\nQuestion:")
    page.page.keyboard.press("Escape")
    page.page.get_by_label("Resolution").select_option("high")
    page.add(STAR)
    page.asked("go")
    body = stub.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    assert parts(body)[0]["image_url"]["detail"] == "high"
    given = {"temperature": 0.7, "top_p": 0.9, "seed": 11, "max_tokens": 64}
    assert {name: body[name] for name in given} == given
    assert body["stop"] == ["\\n", "Question:"]
    page.page.reload()
    page.button("New chat", exact=True).click()
    page.asked("again")
    body = stub.bodies[1]
    assert {name: body[name] for name in given} == given
    # The chat's own.
    assert [message["role"] for message in body["messages"]] == ["user"]


def test_a_setting_that_is_no_number_of_its_kind_changes_nothing(page, stub):
    page.button("Settings").click()
    dialog = page.page.get_by_role("dialog")
    for wrong in ("5", "-1", ""):
        dialog.get_by_label("Temperature").fill(wrong)
    dialog.get_by_label("Longest answer").fill("2.5")
    page.page.keyboard.press("Escape")
    page.asked("go")
    assert stub.bodies[0]["temperature"] == 0
    assert stub.bodies[0]["max_tokens"] == 512
    assert not {"seed", "stop"} & set(stub.bodies[0])


def test_examples_are_sent_as_earlier_turns(page, stub):
    page.button("Examples").click()
    dialog = page.page.get_by_role("dialog")
    for number, (path, answer) in enumerate([(STAR, "red"), (SHAPES, "many")]):
        page.button("Add an example").click()
        shot = dialog.get_by_role("group").nth(number)
        shot.locator("input[type=file]").set_input_files(str(path))
        if number == 0:
            shot.get_by_label("Question").fill("Colour?")
        shot.get_by_label("Answer").fill(answer)
    # Without an answer, and without anything that is asked.
    page.button("Add an example").click()
    expect(dialog.get_by_text("Without an answer it is not shown")).to_be_visible()
    page.button("Add an example").click()
    shot = dialog.get_by_role("group").nth(3)
    shot.get_by_label("Question").fill(" ")
    shot.get_by_label("Answer").fill("blue")
    expect(dialog.get_by_text("Without a picture or a question it is")).to_be_visible()
    dialog.get_by_label("Resolution").select_option("low")
    page.page.keyboard.press("Escape")
    expect(page.button("Examples (4)")).to_be_visible()
    page.add(STAR)
    page.asked("Colour?")
    messages = stub.bodies[0]["messages"]
    picture = {"url": uri(STAR), "detail": "low"}
    assert messages[:2] == [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": picture},
                {"type": "text", "text": "Colour?"},
            ],
        },
        {"role": "assistant", "content": "red"},
    ]
    assert messages[2]["content"][1]["text"] == "Colour?"
    assert messages[3]["content"] == "many"
    assert len(messages) == 5
    assert messages[4]["content"][0]["image_url"]["detail"] == "auto"
    # A picture that is dropped on an example is the example's.
    page.button("Examples").click()
    page.drop("fieldset:last-of-type .target", page.files(SHAPES))
    expect(dialog.get_by_role("img")).to_have_count(3)
    page.button("Remove example 2").click()
    page.page.keyboard.press("Escape")
    expect(page.button("Examples (3)")).to_be_visible()
    expect(page.page.locator(".composer img")).to_have_count(0)


def test_a_refusal_is_shown_in_words_and_asked_again(page):
    answer = page.asked("busy")
    expect(answer.get_by_role("alert")).to_have_text(
        "16 requests wait already. Try again in 3 s."
    )
    page.button("Retry").click()
    expect(page.settle(1)).to_contain_text("You said: busy")


def test_a_question_without_an_answer_is_not_shown_to_the_model(page, stub):
    page.asked("refuse prompt has 25 pictures, at most 24 fit")
    expect(page.page.get_by_role("alert")).to_have_text(
        "Prompt has 25 pictures, at most 24 fit."
    )
    page.asked("go on", count=2)
    assert len(stub.bodies[1]["messages"]) == 1
    expect(page.page.locator(".exchange").first).to_contain_text("is not shown this")


def test_an_answer_that_breaks_off_says_so_and_keeps_what_came(page):
    answer = page.asked("break")
    expect(answer.get_by_role("alert")).to_have_text("The answer broke off.")
    expect(answer.locator(".markdown")).to_have_text("You")


def test_a_server_that_is_gone_is_told(page):
    page.page.route("**/v1/chat/completions", lambda route: route.abort())
    expect(page.asked("anything").get_by_role("alert")).to_contain_text(
        "The server cannot be reached."
    )
    page.page.unroute("**/v1/chat/completions")
    page.button("Retry").click()
    expect(page.settle(1)).to_contain_text("You said: anything")


def test_a_page_without_its_server_says_so_and_tries_again(page):
    page.page.route("**/v1/models", lambda route: route.abort())
    page.page.reload()
    expect(page.page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.page.unroute("**/v1/models")
    page.button("Try again").click()
    expect(page.page.locator(".model")).to_have_text("stub-model")


def test_the_key_is_asked_for_once_and_kept_by_the_tab(page, stub, context):
    stub.key = "s3cret"
    page.page.reload()
    key = page.page.get_by_label("The key that mm1 serve")
    expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    expect(page.page.get_by_role("alert")).to_contain_text("does not know this key")
    key.fill("s3cret")
    key.press("Enter")
    expect(page.page.locator(".model")).to_have_text("stub-model")
    expect(page.asked("say yes")).to_contain_text("yes")
    page.page.reload()
    expect(page.page.locator(".model")).to_have_text("stub-model")
    assert "s3cret" not in page.page.evaluate("JSON.stringify({...localStorage})")
    other = context.new_page()
    other.goto(stub.url)
    expect(other.get_by_label("The key that mm1 serve")).to_be_visible()


def test_without_the_key_a_question_fails_in_words(page, stub):
    stub.key = "s3cret"
    page.ask("hello")
    expect(page.page.get_by_label("The key that mm1 serve")).to_be_visible()
    page.page.keyboard.press("Escape")
    expect(page.settle(1).get_by_role("alert")).to_have_text(
        "The server wants an API key."
    )


@pytest.mark.parametrize(
    ("markdown", "selector", "text"),
    [
        ("a **bold** word", ".markdown strong", "bold"),
        ("# Title", ".markdown h3", "Title"),
        ("- one\n- two", ".markdown li:nth-child(2)", "two"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", ".markdown td:nth-child(2)", "2"),
        ("```\nx < 1\n```", ".markdown pre code", "x < 1"),
        ("- [x] done", ".markdown li", "☑ done"),
        ("[here][1]\n\n[1]: https://example.org/", ".markdown a", "here"),
        ("<b>tag</b> <image>", ".markdown", "<b>tag</b> <image>"),
    ],
)
def test_an_answer_is_markdown(markdown, selector, text, page):
    answer = page.asked(f"say {markdown}")
    expect(answer.locator(selector)).to_have_text(text)


def test_nothing_in_an_answer_acts_or_loads(page):
    answer = page.asked(
        "say <script>document.title = 'x'</script>\n\n<img src=x onerror=alert(1)>\n\n"
        "![p](http://127.0.0.1:9/p.png) [j](javascript:alert(1)) [d](data:text/html,x) "
        "[v](vbscript:x) <a href='javascript:alert(1)'>a</a> [ok](https://example.org)"
    )
    expect(answer.locator("img, script, iframe, [onerror], [style]")).to_have_count(0)
    hrefs = answer.locator("a").evaluate_all("all => all.map(a => a.href)")
    assert [href for href in hrefs if href] == ["https://example.org/"]
    link = answer.get_by_role("link", name="ok")
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert page.page.title() == "mm1"


def test_a_question_is_plain_text(page):
    page.asked("<b>bold</b> **text**")
    expect(page.questions).to_have_text("<b>bold</b> **text**")
    expect(page.questions.locator("b, strong")).to_have_count(0)


def test_the_answer_is_copied(page, context):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.asked("say a **star**")
    page.button("Copy the answer").click()
    expect(page.button("Copied")).to_be_visible()
    assert page.page.evaluate("navigator.clipboard.readText()") == "a **star**"


def test_an_answer_that_comes_fast_is_not_rendered_for_every_token(page):
    page.page.evaluate(
        """() => {
          window.renders = 0;
          const count = all => all.some(
            ({target}) => target.parentElement?.closest(".markdown")) && window.renders++;
          new MutationObserver(count).observe(
            document.body, {childList: true, subtree: true, characterData: true});
        }"""
    )
    text = "word " * 2000
    answer = page.asked(f"say {text}")
    expect(answer.locator(".markdown")).to_have_text(text.strip())
    assert 0 < page.page.evaluate("window.renders") < 500
