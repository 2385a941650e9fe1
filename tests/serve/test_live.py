"""A real server on a port: many clients at once, clients that leave, and the page in a browser."""

import asyncio
import json
import random
import shutil
import socket
import time

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright
from served import QUEUE, SLOTS, Client, serving, settle, small_decoder, small_engine
from served import small_tokenizer as make_tokenizer

from engram_jax.serve.api import Service
from engram_jax.serve.prompts import Words
from engram_jax.serve.server import warm

CLIENTS = 200
STEP = 0.6  # seconds of a slow one
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def service():
  with small_engine(small_decoder()) as engine:
    warm(engine)
    yield Service(engine, Words(make_tokenizer()), "small")


@pytest.fixture(scope="module")
def address(service):
  with serving(service) as address:
    yield address


def body_of(i):
  prompt = ("the capital", "a", "ab cd ef gh", "of")[i % 4]
  return {"prompt": prompt, "max_tokens": 1 + i % 5, "temperature": 1.2, "seed": i % 3}


def test_200_clients_at_once_lose_nothing(service, address):
  """Each is answered, or told to come again and answered then, with what it would get alone."""
  refused = []

  async def one(client, i):
    body = body_of(i) | {"stream": i % 2 == 1}
    while True:
      answer = await client.post("/v1/completions", json=body)
      if answer.status_code != 429:
        return answer
      refused.append(i)
      await asyncio.sleep(random.uniform(0.5, 1) * float(answer.headers["retry-after"]))

  async def everyone():
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
      return await asyncio.gather(*(one(client, i) for i in range(CLIENTS)))

  answers = asyncio.run(everyone())
  assert [a.status_code for a in answers] == [200] * CLIENTS
  assert refused  # the queue holds fewer than that
  alone = {}
  for i, answer in enumerate(answers):
    key = json.dumps(body_of(i))
    alone[key] = alone.get(key) or Client(service).complete(**body_of(i))["choices"][0]["text"]
    if i % 2:
      parts = [json.loads(p[6:]) for p in answer.text.split("\n\n")[:-2]]
      text = "".join(p["choices"][0]["text"] for p in parts)
      assert parts[-1]["choices"][0]["finish_reason"] == "length"
    else:
      text = answer.json()["choices"][0]["text"]
    assert text == alone[key]
  settle(service.engine)
  assert service.engine.status()["failures"] == 0


@pytest.fixture
def slowly(service, monkeypatch):
  """Makes a request last, so that its end can be told from its being cancelled."""
  step = service.engine._slots.step

  def slow(*args):
    time.sleep(STEP)
    return step(*args)

  monkeypatch.setattr(service.engine._slots, "step", slow)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_slot(service, address, slowly, stream):
  """Without a word: the connection is closed while the request runs, others wait."""
  settle(service.engine)
  host, port = address.removeprefix("http://").split(":")
  body = json.dumps({"prompt": "a", "max_tokens": 30, "stream": stream}).encode()
  head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
  sockets = []
  for _ in range(SLOTS + 2):
    sockets.append(socket.create_connection((host, int(port))))
    sockets[-1].sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
  wait_for(lambda: service.engine.status()["busy"] == SLOTS)
  wait_for(lambda: service.engine.status()["waiting"] == 2)
  if stream:
    assert sockets[0].recv(15) == b"HTTP/1.1 200 OK"
  begin = time.monotonic()
  for each in sockets:
    each.close()
  settle(service.engine)
  assert time.monotonic() - begin < 30 * STEP / 2  # to the end it takes longer than this
  assert service.engine.status()["failures"] == 0


def wait_for(condition):
  for _ in range(3000):
    if condition():
      return
    time.sleep(0.01)
  pytest.fail("waited half a minute for nothing")


def test_what_is_not_http_is_400(address):
  host, port = address.removeprefix("http://").split(":")
  with socket.create_connection((host, int(port)), timeout=60) as plain:
    plain.sendall(b"\x00\xff rubbish\r\n\r\n")
    assert b" 400 " in plain.recv(100)


@pytest.fixture
def page(address):
  if CHROMIUM is None:
    pytest.skip("no Chromium here: apt-get install chromium")
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    try:
      expect.set_options(timeout=120_000)
      page = browser.new_page()
      page.set_default_timeout(120_000)
      page.goto(address)
      yield page
    finally:
      browser.close()


def test_the_page_shows_tokens_coloured_by_gate(address, page):
  """Typed into and clicked on in Chromium, without a complaint from it."""
  complaints = []
  page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
  page.on("pageerror", lambda error: complaints.append(str(error)))
  expect(page).to_have_title("small")
  page.fill("#prompt", "the cap")
  page.fill("#tokens", "12")
  page.fill("#temperature", "0")
  page.click("#go")
  expect(page.locator("#status")).to_contain_text("done")
  body = {"prompt": "the cap", "max_tokens": 12, "temperature": 0, "echo": True, "gates": True}
  (choice,) = httpx.post(f"{address}/v1/completions", json=body).json()["choices"]
  assert page.text_content("#text") == choice["text"]
  assert page.text_content("#status").startswith("12 tokens")
  spans = page.eval_on_selector_all(
    "#text span", "all => all.map(s => [s.textContent, s.className, s.style.backgroundColor])"
  )
  tokens = choice["engram"]["tokens"]
  assert [s[0] for s in spans] == [t["text"] for t in tokens]
  assert [s[1] for s in spans] == ["old"] * len("the cap") + ["new"] * 12
  opacity = lambda colour: float(colour.rstrip(")").rpartition(",")[2])
  assert [opacity(s[2]) for s in spans] == pytest.approx(
    [sum(t["gates"]) / 2 for t in tokens], abs=0.01
  )
  page.select_option("#memory", "1")
  spans = page.eval_on_selector_all("#text span", "all => all.map(s => s.style.backgroundColor)")
  assert [opacity(s) for s in spans] == pytest.approx([t["gates"][1] for t in tokens], abs=0.01)
  assert complaints == []


def test_the_page_says_what_is_wrong_and_stops_when_told(service, page, slowly):
  expect(page).to_have_title("small")
  page.fill("#prompt", "")
  page.click("#go")
  page.wait_for_selector("#status.bad")
  assert "empty prompt" in page.text_content("#status")
  page.fill("#prompt", "a")
  page.fill("#tokens", "30")
  page.click("#go")
  page.wait_for_selector("#text .new")
  page.click("#stop")
  expect(page.locator("#status")).to_have_text("stopped")
  settle(service.engine)


def test_the_queue_is_smaller_than_the_crowd():
  assert QUEUE + SLOTS < CLIENTS
