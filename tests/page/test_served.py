"""The page as ``mm1 serve`` shows it, with the embedded model."""

import os
import re
import subprocess
import sys

import pytest
from driver import SHAPES, STAR, Driver
from playwright.sync_api import expect

from mm1_mlx import generate, load
from mm1_mlx.apps.page import DIST, POLICY

COMMAND = "from mm1_mlx.apps.cli import main; main()"
KEY = "not-so-secret"


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MM1_API_KEY": KEY},
    )
    try:
        yield re.search(r"http://\S+", process.stderr.readline())[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def page(context, server):
    page = context.new_page()
    context.add_init_script(f"sessionStorage.setItem('mm1-key', '{KEY}')")
    driver = Driver(page, server)
    yield driver
    assert driver.complaints == []


def test_the_server_shows_these_files_under_this_policy(page, server):
    for path in DIST.rglob("*"):
        if path.is_file():
            name = path.relative_to(DIST).as_posix()
            name = "" if name == "index.html" else name
            response = page.page.request.get(f"{server}/{name}")
            assert response.body() == path.read_bytes()
            assert response.headers["content-security-policy"] == POLICY


def test_the_model_answers_about_pictures_as_it_does_in_python(page):
    page.add(STAR)
    answer = page.asked("What colour is the star?")
    with load() as runtime:
        expected = generate(runtime, "What colour is the star?", [STAR])
    expect(answer.locator(".markdown")).to_have_text(expected.text.strip())
    tokens = f"{expected.prompt_tokens} prompt tokens ({expected.image_tokens} of"
    expect(answer.locator(".cost")).to_contain_text(tokens)
    expect(answer.locator(".cost")).to_contain_text("per second")
    # The picture is known by now.
    answer = page.asked("What colour is the star?", count=2)
    expect(answer.locator(".cost")).to_contain_text("known before")


def test_every_resolution_is_answered(page):
    for count, detail in enumerate(("low", "high", "auto"), start=1):
        page.page.get_by_label("Resolution").select_option(detail)
        page.add(SHAPES)
        answer = page.asked("How many shapes are there?", count)
        expect(answer.get_by_role("alert")).to_have_count(0)
        expect(answer.locator(".markdown")).not_to_be_empty()


def test_examples_settings_and_stops_are_taken(page):
    page.button("Examples").click()
    page.button("Add an example").click()
    shot = page.page.get_by_role("group")
    shot.locator("input[type=file]").set_input_files(str(STAR))
    shot.get_by_label("Question").fill("What colour is the star?")
    shot.get_by_label("Answer").fill("red")
    page.page.keyboard.press("Escape")
    page.button("Settings").click()
    dialog = page.page.get_by_role("dialog")
    dialog.get_by_label("Temperature").fill("0.5")
    dialog.get_by_label("Top-p").fill("0.9")
    dialog.get_by_label("Seed").fill("7")
    dialog.get_by_label("Longest answer").fill("24")
    dialog.get_by_label("Stop before").fill("heart")
    page.page.keyboard.press("Escape")
    page.add(SHAPES)
    answer = page.asked("Describe the picture.")
    expect(answer.get_by_role("alert")).to_have_count(0)
    expect(answer.locator(".markdown")).not_to_contain_text("heart")


def test_what_the_server_refuses_is_read_in_its_words(page):
    page.add(*[STAR] * 25)
    answer = page.asked("How many?")
    expect(answer.get_by_role("alert")).to_contain_text("24")
