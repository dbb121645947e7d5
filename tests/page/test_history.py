"""Chats stay in the browser, in several tabs at once, and where nothing can be kept."""

import pytest
from driver import SHAPES, STAR, Driver
from playwright.sync_api import expect

FULL = """() => {
  const {put} = IDBObjectStore.prototype;
  window.full = true;
  IDBObjectStore.prototype.put = function (...values) {
    if (window.full) throw new DOMException("no room", "QuotaExceededError");
    return put.apply(this, values);
  };
}"""


def test_a_chat_is_there_after_a_reload(page, stub):
    page.add(STAR, SHAPES)
    page.asked("say **red**")
    page.kept()
    page.page.reload()
    expect(page.questions).to_contain_text("say **red**")
    pictures = page.questions.get_by_role("img")
    expect(pictures).to_have_count(2)
    expect(pictures.last).to_have_js_property("naturalWidth", 256)
    expect(page.answers.locator("strong")).to_have_text("red")
    expect(page.answers.locator(".cost")).to_contain_text("28 prompt tokens")
    # And goes on as it was.
    page.asked("and?", count=2)
    before = stub.bodies[1]["messages"][0]["content"]
    assert before == stub.bodies[0]["messages"][0]["content"]


def test_examples_and_the_system_message_are_there_after_a_reload(page, stub):
    page.button("Settings").click()
    page.page.get_by_label("System message").fill("Be short.")
    page.page.keyboard.press("Escape")
    page.button("Examples").click()
    page.button("Add an example").click()
    shot = page.page.get_by_role("group")
    shot.locator("input[type=file]").set_input_files(str(STAR))
    shot.get_by_label("Answer").fill("red")
    page.page.keyboard.press("Escape")
    page.page.wait_for_timeout(1500)
    page.kept()
    page.page.reload()
    expect(page.button("Examples (1)")).to_be_visible()
    page.asked("go")
    roles = [message["role"] for message in stub.bodies[0]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert stub.bodies[0]["messages"][1]["content"][0]["type"] == "image_url"


def test_what_was_written_when_the_page_was_left_is_there(page):
    page.ask("count 1000")
    expect(page.chats).to_have_count(1)
    expect(page.answers.locator(".markdown")).to_contain_text("0 1 2 3")
    page.page.reload()
    expect(page.settle(1)).to_contain_text("Stopped.")
    expect(page.questions).to_have_text("count 1000")
    page.button("Retry").click()
    expect(page.answers.locator(".markdown")).to_contain_text("0 1")


def test_several_chats_are_listed_opened_and_deleted(page):
    page.add(STAR)
    page.asked("say one")
    page.button("New chat", exact=True).click()
    expect(page.page.get_by_text("Ask about pictures")).to_be_visible()
    expect(page.question).to_be_focused()
    page.add(SHAPES)
    page.asked("say two")
    page.kept()
    expect(page.chats).to_have_text(["say two", "say one"])
    page.page.get_by_role("link", name="say one").click()
    expect(page.answers.locator(".markdown")).to_have_text("one")
    expect(page.page.get_by_role("link", name="say one")).to_have_attribute(
        "aria-current", "page"
    )
    page.page.go_back()
    expect(page.answers.locator(".markdown")).to_have_text("two")
    page.button("Delete say two").click()
    page.button("Keep").click()
    expect(page.button("Delete say two")).to_be_focused()
    page.button("Delete say two").click()
    page.button("Delete", exact=True).click()
    expect(page.chats).to_have_text(["say one"])
    expect(page.page.get_by_text("Ask about pictures")).to_be_visible()
    page.page.wait_for_timeout(300)
    assert page.counts() == [1, 1]
    page.page.reload()
    expect(page.chats).to_have_text(["say one"])


def test_an_answer_goes_on_in_its_own_chat(page):
    page.ask("count 40")
    expect(page.answers.locator(".markdown")).to_contain_text("0 1")
    page.button("New chat", exact=True).click()
    page.asked("say other")
    expect(page.answers.locator(".markdown")).to_have_text("other")
    page.page.get_by_role("link", name="count 40").click()
    expect(page.settle(1).locator(".markdown")).to_contain_text("38 39")
    page.page.get_by_role("link", name="say other").click()
    expect(page.answers.locator(".markdown")).to_have_text("other")


def test_what_is_typed_waits_in_its_chat(page):
    page.asked("say one")
    page.question.fill("half a quest")
    page.button("New chat", exact=True).click()
    expect(page.question).to_have_value("")
    page.page.get_by_role("link", name="say one").click()
    expect(page.question).to_have_value("half a quest")


def test_pictures_that_an_edit_took_out_are_not_kept(page):
    page.add(STAR, SHAPES)
    page.asked("first")
    page.kept()
    assert page.counts() == [1, 2]
    page.button("Edit the question").click()
    page.button("Remove red-star.png").click()
    page.button("Ask again").click()
    page.settle(1)
    page.page.wait_for_timeout(1500)
    assert page.counts() == [1, 1]


@pytest.fixture
def second(page, context, stub):
    """The same chat, in another tab."""
    page.add(STAR)
    page.asked("say one")
    page.kept()
    other = Driver(context.new_page(), page.page.url)
    expect(other.answers).to_have_count(1)
    yield other
    assert other.complaints == []
    assert stub.bodies


def test_another_tab_follows(page, second):
    page.asked("say two", count=2)
    expect(second.settle(2).locator(".markdown")).to_have_text("two")
    second.asked("say three", count=3)
    expect(page.settle(3).locator(".markdown")).to_have_text("three")
    expect(page.chats).to_have_count(1)


# What the other tab says comes too late.
DEAF = "Object.defineProperty(BroadcastChannel.prototype, 'onmessage', {set() {}})"


def test_two_tabs_that_write_at_once_keep_both(page, context):
    page.add(STAR)
    page.asked("say one")
    page.kept()
    context.add_init_script(DEAF)
    second = Driver(context.new_page(), page.page.url)
    expect(second.answers).to_have_count(1)
    page.ask("count 60")
    second.ask("count 50")
    first, other = page.settle(2), second.settle(2)
    expect(first.locator(".markdown")).to_contain_text("58 59")
    expect(other.locator(".markdown")).to_contain_text("48 49")
    expect(page.chats).to_have_count(2)
    expect(second.chats).to_have_count(2)
    assert page.page.url != second.page.url
    notices = [d.page.get_by_text("a chat of its own").count() for d in (page, second)]
    assert sorted(notices) == [0, 1]
    page.page.wait_for_timeout(1500)
    assert page.counts() == [2, 2]
    for driver, last in ((page, "58 59"), (second, "48 49")):
        driver.page.reload()
        expect(driver.settle(2).locator(".markdown")).to_contain_text(last)
        expect(driver.questions.get_by_role("img")).to_have_js_property(
            "naturalWidth", 192
        )


def test_a_chat_that_another_tab_deletes_goes(page, second):
    second.button("Delete say one").click()
    second.button("Delete", exact=True).click()
    expect(page.chats).to_have_count(0)
    expect(page.page.get_by_text("Ask about pictures")).to_be_visible()


def test_a_chat_that_is_deleted_while_it_is_answered_elsewhere_is_kept(page, second):
    page.ask("count 60")
    expect(page.answers.last.locator(".markdown")).to_contain_text("0 1")
    second.button("Delete say one").click()
    second.button("Delete", exact=True).click()
    expect(page.settle(2).locator(".markdown")).to_contain_text("58 59")
    page.kept()
    page.page.reload()
    expect(page.settle(2).locator(".markdown")).to_contain_text("58 59")


def test_without_storage_the_page_works_and_says_so(context, stub):
    context.add_init_script(
        "Object.defineProperty(window, 'indexedDB', {get: () => { throw new "
        "DOMException('no', 'SecurityError'); }}); for (const name of ['localStorage',"
        "'sessionStorage']) Object.defineProperty(window, name, {get: () => { throw "
        "new DOMException('no', 'SecurityError'); }});"
    )
    page = Driver(context.new_page(), stub.url)
    expect(page.page.get_by_role("complementary")).to_contain_text("storage is off")
    page.add(STAR)
    page.asked("say one")
    page.button("New chat", exact=True).click()
    page.asked("say two")
    page.page.get_by_role("link", name="say one").click()
    expect(page.answers.locator(".markdown")).to_have_text("one")
    expect(page.questions.get_by_role("img")).to_have_count(1)
    assert page.complaints == []


def test_where_the_storage_is_full_the_page_says_so_and_keeps_it_when_there_is_room(
    page,
):
    page.asked("say one")
    page.kept()
    page.button("New chat", exact=True).click()
    page.page.evaluate(FULL)
    page.asked("say two")
    aside = page.page.get_by_role("complementary")
    expect(aside).to_contain_text("storage is full")
    expect(page.chats).to_have_text(["say two", "say one"])
    page.page.evaluate("window.full = false")
    page.button("Delete say one").click()
    page.button("Delete", exact=True).click()
    expect(aside).not_to_contain_text("storage is full")
    page.kept()
    page.page.reload()
    expect(page.settle(1).locator(".markdown")).to_have_text("two")


def test_what_could_not_be_kept_is_not_overwritten_by_another_tab(page, second):
    page.page.evaluate(FULL)
    page.asked("say mine", count=2)
    second.asked("say theirs", count=2)
    second.kept()
    # The other tab's word has come by the time that its chat is listed anew.
    page.page.wait_for_timeout(1000)
    expect(page.answers.last.locator(".markdown")).to_have_text("mine")
    expect(page.page.get_by_role("complementary")).to_contain_text("storage is full")
    page.page.evaluate("window.full = false")
    page.asked("say more", count=3)
    expect(page.page.get_by_text("a chat of its own")).to_be_visible()
    expect(second.chats).to_have_count(2)
    expect(second.answers.last.locator(".markdown")).to_have_text("theirs")
