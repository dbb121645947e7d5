"""What a person does on the page, in the words of the tests."""

import base64
import time
from pathlib import Path

from playwright.sync_api import expect

from mm1_mlx.runtime import TINY

STAR = TINY / "red-star.png"
SHAPES = TINY / "four-shapes.png"
_FILES = """files => {
  const data = new DataTransfer();
  for (const [name, type, text] of files) {
    const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
    data.items.add(new File([bytes], name, {type}));
  }
  return data;
}"""
_PASTE = """(field, data) => field.dispatchEvent(
  new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}))"""

_OPEN = """
  const done = request => new Promise(done => {
    request.onsuccess = () => done(request.result);
  });
  const db = await done(indexedDB.open("mm1"));
  const store = name => db.transaction(name).objectStore(name);
"""
# How many answers of the open chat are kept as ended ones.
_SETTLED = f"""async () => {{{_OPEN}
  const chat = await done(store("chats").get(location.hash.slice(1)));
  db.close();
  const running = ["asked", "writing"];
  return chat?.exchanges.filter(({{answer}}) => !running.includes(answer.state)).length;
}}"""
_COUNTS = f"""async () => {{{_OPEN}
  const counts = [await done(store("chats").count()), await done(store("pictures").count())];
  db.close();
  return counts;
}}"""


class Driver:
    def __init__(self, page, url):
        self.page = page
        self.complaints = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._listen)
        page.goto(url)
        self.question = page.get_by_label("Question", exact=True)
        self.answers = page.locator(".answer")
        self.questions = page.locator(".said")
        self.chats = page.get_by_role("complementary").get_by_role("listitem")

        # It knows its server: what a test changes of that comes later.
        page.locator(".model:not(:empty)").wait_for()

    def _listen(self, message):
        # The browser logs a status of 400 and above itself.
        if message.type in ("error", "warning") and "Failed to load" not in (
            message.text
        ):
            self.complaints.append(message.text)

    def button(self, name, **options):
        return self.page.get_by_role("button", name=name, **options)

    def add(self, *paths):
        """Add pictures to the question by the file dialog."""
        chooser = self.page.locator(".composer input[type=file]")
        chooser.set_input_files([str(path) for path in paths])

    def files(self, *paths, kind="image/png"):
        """A DataTransfer of the page that holds these files."""
        files = [
            (Path(path).name, kind, base64.b64encode(Path(path).read_bytes()).decode())
            for path in paths
        ]
        return self.page.evaluate_handle(_FILES, files)

    def drop(self, selector, data):
        for kind in ("dragover", "drop"):
            self.page.dispatch_event(selector, kind, {"dataTransfer": data})

    def paste(self, locator, data):
        locator.evaluate(_PASTE, data)

    def ask(self, text):
        """Ask, and do not wait for the answer."""
        self.question.fill(text)
        self.question.press("Enter")

    def settle(self, count):
        """The last of so many answers, when it has ended."""
        expect(self.answers).to_have_count(count)
        last = self.answers.last
        expect(last).to_have_attribute("aria-busy", "false")
        return last

    def asked(self, text, count=1):
        """Ask, and give the answer that came."""
        self.ask(text)
        return self.settle(count)

    def kept(self):
        """Wait until the open chat is in the browser's storage as it is on the page."""
        shown = self.page.locator(".exchange").count()
        until = time.monotonic() + 30
        while self.page.evaluate(_SETTLED) != shown:
            assert time.monotonic() < until, "the chat was not kept"
            self.page.wait_for_timeout(50)

    def counts(self):
        """Chats and pictures in the browser's storage."""
        return self.page.evaluate(_COUNTS)
