"""A real server on a port: many clients at once, disconnects, and the page in a browser."""

import asyncio
import json
import random
import shutil
import socket
import time

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright
from small_server import QUEUE, SLOTS, Client, serving, settle, small_decoder, small_engine
from small_server import small_tokenizer as make_tokenizer

from engram_jax.serve.api import Service
from engram_jax.serve.prompts import PromptEncoder
from engram_jax.serve.server import warm_up

CLIENTS = 200
STEP = 0.6  # seconds of a slow step
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def service():
  with small_engine(small_decoder()) as engine:
    warm_up(engine)
    yield Service(engine, PromptEncoder(make_tokenizer()), "small")


@pytest.fixture(scope="module")
def address(service):
  with serving(service) as address:
    yield address


def body_of(i):
  prompt = ("the capital", "a", "ab cd ef gh", "of")[i % 4]
  return {"prompt": prompt, "max_tokens": 1 + i % 5, "temperature": 1.2, "seed": i % 3}


def test_200_clients_at_once_all_get_their_responses(service, address):
  """Each gets the response it would get alone, at once or after a 429 and a retry."""
  refused = []

  async def complete(client, i):
    body = body_of(i) | {"stream": i % 2 == 1}
    while True:
      response = await client.post("/v1/completions", json=body)
      if response.status_code != 429:
        return response
      refused.append(i)
      await asyncio.sleep(random.uniform(0.5, 1) * float(response.headers["retry-after"]))

  async def run_all():
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
      return await asyncio.gather(*(complete(client, i) for i in range(CLIENTS)))

  responses = asyncio.run(run_all())
  assert [a.status_code for a in responses] == [200] * CLIENTS
  assert refused  # the queue holds fewer than that
  alone = {}
  for i, response in enumerate(responses):
    key = json.dumps(body_of(i))
    alone[key] = alone.get(key) or Client(service).complete(**body_of(i))["choices"][0]["text"]
    if i % 2:
      chunks = [json.loads(p[6:]) for p in response.text.split("\n\n")[:-2]]
      text = "".join(p["choices"][0]["text"] for p in chunks)
      assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    else:
      text = response.json()["choices"][0]["text"]
    assert text == alone[key]
  settle(service.engine)
  assert service.engine.status()["failures"] == 0


@pytest.fixture
def slow_steps(service, monkeypatch):
  """Makes every step slow, so that the end of a request differs in time from its cancellation."""
  step = service.engine._slots.step

  def slow(*args):
    time.sleep(STEP)
    return step(*args)

  monkeypatch.setattr(service.engine._slots, "step", slow)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_slot(service, address, slow_steps, stream):
  """The connections are closed while some requests run and others wait."""
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
  for connection in sockets:
    connection.close()
  settle(service.engine)
  assert time.monotonic() - begin < 30 * STEP / 2  # to the end it takes longer than this
  assert service.engine.status()["failures"] == 0


def wait_for(condition):
  for _ in range(3000):
    if condition():
      return
    time.sleep(0.01)
  pytest.fail("the condition did not hold within half a minute")


def test_bytes_that_are_not_http_get_400(address):
  host, port = address.removeprefix("http://").split(":")
  with socket.create_connection((host, int(port)), timeout=60) as connection:
    connection.sendall(b"\x00\xff rubbish\r\n\r\n")
    assert b" 400 " in connection.recv(100)


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
  """Filled in and clicked in Chromium, which logs no error."""
  errors = []
  page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
  page.on("pageerror", lambda error: errors.append(str(error)))
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
  assert errors == []


def test_the_page_shows_errors_and_can_stop(service, page, slow_steps):
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


def test_the_queue_is_smaller_than_the_number_of_clients():
  assert QUEUE + SLOTS < CLIENTS
