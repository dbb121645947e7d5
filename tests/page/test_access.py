"""Usable by keyboard and screen reader, in both themes, on a phone, without movement."""

import re

import pytest
from browser_needed import need_modules
from driver import SHAPES, STAR, Driver
from playwright.sync_api import expect

PHONE = {"width": 375, "height": 700}
ANSWER = (
    "say ## Found\n\nA star [100, 100, 400, 400] and `code`:\n\n- one\n- [two]"
    "(https://example.org)\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> quoted\n\n```\nx = 1\n```"
)


@pytest.fixture(params=["light", "dark"])
def theme(request):
    return request.param


def faults(page):
    """What axe finds that keeps people out."""
    # By the debugger: the page's own policy would refuse it.
    page.evaluate((need_modules() / "axe-core/axe.min.js").read_text())
    found = page.evaluate("axe.run()")["violations"]
    return [
        (fault["id"], fault["impact"], [node["html"][:200] for node in fault["nodes"]])
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]


def background(page):
    return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")


def brightness(page):
    return sum(int(part) for part in background(page)[4:-1].split(","))


def test_axe_finds_no_serious_fault(page, theme):
    page.page.emulate_media(color_scheme=theme)
    assert (brightness(page.page) < 200) == (theme == "dark")
    assert faults(page.page) == []
    page.add(SHAPES)
    page.asked(ANSWER)
    page.asked("refuse this and that", count=2)
    page.add(STAR, SHAPES)
    page.question.fill("typed")
    assert faults(page.page) == []
    page.button("Edit the question").first.click()
    assert faults(page.page) == []
    page.page.keyboard.press("Escape")
    for name in ("Settings", "Examples"):
        page.button(name).click()
        if name == "Examples":
            page.button("Add an example").click()
        assert faults(page.page) == []
        page.page.keyboard.press("Escape")
    page.button("Delete say ## Found").click()
    assert faults(page.page) == []
    page.button("Keep").click()
    page.ask("count 1000")
    expect(page.answers.last.locator(".markdown")).to_contain_text("0 1")
    assert faults(page.page) == []


def test_axe_finds_no_serious_fault_on_a_phone(page, theme, stub):
    page.page.emulate_media(color_scheme=theme)
    page.page.set_viewport_size(PHONE)
    page.add(SHAPES)
    page.asked(ANSWER)
    assert faults(page.page) == []
    page.button("Chats").click()
    assert faults(page.page) == []
    page.page.keyboard.press("Escape")
    stub.key = "s3cret"
    page.ask("more")
    expect(page.page.get_by_label("The key that mm1 serve")).to_be_visible()
    assert faults(page.page) == []


def test_the_theme_is_switched_and_stays(page):
    page.page.emulate_media(color_scheme="light")
    light = background(page.page)
    page.button("Theme: auto. Change to light").click()
    page.button("Theme: light. Change to dark").click()
    assert background(page.page) != light
    page.page.reload()
    expect(page.button("Theme: dark")).to_be_visible()
    assert brightness(page.page) < 200
    page.button("Theme: dark. Change to auto").click()
    assert background(page.page) == light


@pytest.mark.parametrize("width", [320, 375, 768])
def test_nothing_is_cut_off_on_a_narrow_screen(page, width):
    page.page.set_viewport_size({"width": width, "height": 640})
    page.add(STAR, SHAPES)
    page.asked("say " + "unbroken" * 40 + "\n\n```\n" + "x" * 300 + "\n```")
    page.add(STAR, SHAPES)
    for edited in (False, True):
        if edited:
            page.button("Edit the question").click()
        wide = page.page.evaluate(
            "() => document.documentElement.scrollWidth - innerWidth"
        )
        assert wide <= 0
        log = page.page.locator(".log")
        assert log.evaluate("log => log.scrollWidth - log.clientWidth") == 0
        # One row asks.
        assert page.page.locator(".composer .bar").bounding_box()["height"] < 60
        inside = page.page.locator(".composer button, .top button, .composer textarea")
        for control in inside.all():
            box = control.bounding_box()
            if box:
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width


def test_chats_are_reached_on_a_phone(page):
    page.page.set_viewport_size(PHONE)
    page.asked("say one")
    page.button("Chats").click()
    drawer = page.page.get_by_role("dialog", name="Chats")
    drawer.get_by_role("button", name="New chat", exact=True).click()
    expect(drawer).to_have_count(0)
    expect(page.question).to_be_focused()
    page.asked("say two")
    page.button("Chats").click()
    drawer.get_by_role("link", name="say one").click()
    expect(page.answers.locator(".markdown")).to_have_text("one")
    expect(drawer).to_have_count(0)


def test_everything_is_reached_by_the_tab_key_in_order_and_seen(page):
    page.asked("say one")
    page.kept()
    page.page.reload()
    page.settle(1)
    reached = []
    for _ in range(20):
        page.page.keyboard.press("Tab")
        name, seen = page.page.evaluate(
            """() => {
              const focused = document.activeElement;
              if (focused === document.body) return ["", false];
              const ring = e => e && getComputedStyle(e).outlineStyle !== "none";
              const name = focused.ariaLabel ?? focused.textContent.trim();
              return [name, ring(focused) || ring(focused.closest(".composer"))];
            }"""
        )
        if not name:
            break
        assert seen, name
        reached.append(name)
    order = [
        "Skip to the question",
        "New chat",
        "say one",
        "Delete say one",
        "Examples",
        "Settings",
        "Theme: auto. Change to light",
        "Conversation",
        "Edit the question",
        "Copy the answer",
        "Retry",
        "Question",
        "Add pictures",
    ]
    assert reached[: len(order)] == order


def test_a_question_is_asked_and_changed_by_keys_alone(page):
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Enter")
    expect(page.question).to_be_focused()
    page.page.keyboard.type("say one")
    page.page.keyboard.press("Enter")
    page.settle(1)
    expect(page.question).to_be_focused()
    page.button("Settings").focus()
    page.page.keyboard.press("Enter")
    expect(page.page.get_by_role("dialog")).to_be_visible()
    page.page.keyboard.press("Escape")
    expect(page.button("Settings")).to_be_focused()


def test_a_screen_reader_is_told_the_answer_sentence_by_sentence(page):
    live = page.page.locator("[aria-live=polite]")
    page.ask("say A **red** star. A blue heart! It has 3.5 corners")
    page.settle(1)
    expect(live.locator("p")).to_have_text(
        ["A red star.", "A blue heart!", "It has 3.5 corners", "End of the answer."]
    )
    page.ask("count 1000")
    expect(live).to_contain_text("The answer is being written.")
    page.question.press("Escape")
    expect(live).to_contain_text("Stopped.")
    expect(live).not_to_contain_text("A red star")


def test_an_old_answer_is_not_read_again(page):
    page.asked("say one")
    page.kept()
    page.page.reload()
    page.settle(1)
    expect(page.page.locator("[aria-live=polite]")).to_be_empty()


def test_nothing_moves_where_that_is_asked_for(context, stub):
    page = Driver(context.new_page(), stub.url)
    moving = "document.getAnimations().length"
    page.page.route("**/v1/chat/completions", lambda _: None)
    page.ask("wait")
    expect(page.page.locator(".waiting")).to_be_visible()
    assert page.page.evaluate(moving) == 1
    page.page.emulate_media(reduced_motion="reduce")
    assert page.page.evaluate(moving) == 0


def test_the_end_stays_in_sight_where_pictures_take_room(page):
    at_end = """() => {
      const {scrollHeight, scrollTop, clientHeight} = document.querySelector(".log");
      return scrollHeight > clientHeight && scrollHeight - scrollTop - clientHeight < 2;
    }"""
    page.add(SHAPES)
    page.asked("say " + "line\n\n" * 60)
    answer = page.asked("say a star [100, 100, 900, 900]", count=2)
    expect(answer.locator("figcaption li")).to_have_count(1)
    page.page.wait_for_function(at_end)
    page.add(STAR)
    expect(page.page.locator(".composer img")).to_be_visible()
    page.page.wait_for_function(at_end)


def test_the_end_stays_in_sight_until_one_scrolls_away(page):
    page.asked("say " + "line\n\n" * 60)
    log = page.page.locator(".log")
    gap = "log => log.scrollHeight - log.scrollTop - log.clientHeight"
    assert log.evaluate(gap) < 2
    page.ask("count 1000")
    # A new question is gone to, so one scrolls away once its answer comes.
    answer = page.answers.nth(1).locator(".markdown")
    expect(answer).to_contain_text("0 1 2 3")
    log.evaluate("log => log.scrollTo(0, 0)")
    expect(page.button("To the end")).to_be_visible()
    so_far = len(answer.inner_text())
    expect(answer).to_contain_text(re.compile(rf"^[\d\s]{{{so_far + 20},}}"))
    assert log.evaluate("log => log.scrollTop") == 0
    page.button("To the end").click()
    expect(page.button("To the end")).to_have_count(0)
    assert log.evaluate(gap) < 2
    page.button("Stop").click()
