"""Pictures that are none, too large, broken, or somewhere else."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import pytest
from PIL import Image
from tests.serving.door.conftest import SMALL, Behind, animated, chat, encoded, once, png, url

from foveate.serving.door import Door
from foveate.serving.door.rules import TRANSFORMERS, VLLM, Rules

PLAIN = Image.new("RGB", (16, 12), "blue")
NOISE = Image.effect_noise((64, 64), 50)


def passed(behind: Behind) -> Image.Image:
    """The picture that came through to the server."""
    (message,) = behind.bodies[-1]["messages"]
    head, _, text = message["content"][0]["image_url"]["url"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    assert head == f"data:image/{picture.format.lower()};base64"
    return picture


@pytest.fixture
def door(behind: Behind) -> Door:
    return Door(behind, Rules(max_pixels=200_000))


@pytest.mark.parametrize(
    "content",
    [
        encoded(PLAIN),
        encoded(PLAIN, "JPEG"),
        encoded(PLAIN, "WEBP"),
        encoded(PLAIN, "BMP"),
        encoded(Image.new("RGB", (1, 1))),
        encoded(Image.new("RGB", (10_000, 10))),
        encoded(Image.new("CMYK", (16, 12)), "JPEG"),
        encoded(Image.new("P", (16, 12))),
        encoded(Image.new("I;16", (16, 12))),
        animated(),
    ],
    ids=["png", "jpeg", "webp", "bmp", "1x1", "10000x10", "cmyk", "palette", "deep", "animated"],
)
def test_pictures_of_every_kind_pass(door: Door, behind: Behind, content: bytes) -> None:
    assert once(door, chat(url(content))).status == 200
    assert passed(behind).convert("RGB").size == Image.open(io.BytesIO(content)).size


def test_the_first_frame_of_an_animation_is_the_picture(door: Door, behind: Behind) -> None:
    once(door, chat(url(animated(), "image/gif")))

    assert passed(behind).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["image/jpeg", "IMAGE/PNG", "image/png;charset=x", ""])
def test_of_what_sort_a_picture_is_its_content_says(door: Door, behind: Behind, kind: str) -> None:
    assert once(door, chat(url(encoded(PLAIN), kind))).status == 200
    assert passed(behind).format == "PNG"


@pytest.mark.parametrize(
    ("content", "reason", "said"),
    [
        (encoded(NOISE, "JPEG")[:-200], "picture", "cannot be read"),
        (encoded(NOISE)[:-200], "picture", "cannot be read"),
        (encoded(NOISE, "WEBP")[:-200], "picture", ""),
        (b"\xff\xd8\xff\xe0" + bytes(100), "picture", ""),
        (b"GIF89a", "picture", ""),
        (b"", "picture", "no picture"),
        (b"%PDF-1.4", "picture", "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "picture", "no picture"),
        (encoded(PLAIN, "TIFF"), "picture", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "picture", "no picture"),
        (encoded(Image.new("RGB", (500, 500))), "pixels", "500x500 is more than 200000 pixels"),
        (png(50_000, 50_000, zlib.compress(bytes(2**20))), "pixels", "more than 200000 pixels"),
        (png(10_000, 10_000, zlib.compress(bytes(2**20))), "pixels", "10000x10000"),
        (png(400, 400, zlib.compress(bytes(1000))), "picture", "cannot be read"),
    ],
)
def test_what_is_no_whole_small_picture_is_refused(
    door: Door, behind: Behind, content: bytes, reason: str, said: str
) -> None:
    reply = once(door, chat(SMALL, url(content)))

    assert (reply.status, reply.error["param"]) == (400, reason)
    assert reply.error["message"].startswith("messages[0].content[1].image_url: ")
    assert said in reply.error["message"]
    assert behind.bodies == []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("/etc/hostname", "scheme"),
        ("picture.png", "scheme"),
        ("", "scheme"),
        (" " + SMALL, "scheme"),
        (SMALL.partition(",")[2], "scheme"),
        ("file:///etc/hostname", "scheme"),
        ("FILE:///etc/hostname", "scheme"),
        ("ftp://example.org/a.png", "scheme"),
        ("s3://bucket/a.png", "scheme"),
        ("//example.org/a.png", "scheme"),
        ("http://example.org/a.png", "domain"),
        ("HTTPS://example.org/a.png", "domain"),
        ("http://127.0.0.1/", "domain"),
        ("http://[::1", "url"),
        ("data:text/html;base64,PGI+", "picture"),
        ("data:image/png,abc", "picture"),
        ("data:image/png;base64", "picture"),
        ("data:image/png;base64,***", "picture"),
        (SMALL + "\n", "picture"),
        (None, "part"),
        (7, "part"),
    ],
)
def test_all_but_whole_data_urls_is_refused(door: Door, behind: Behind, given: Any, reason: str) -> None:
    for body in (chat(given), {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": given}]}]}):
        reply = once(door, body)

        assert (reply.status, reply.error["param"]) == (400, reason if not isinstance(given, int) else "part")
    assert behind.bodies == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": "/etc/hostname"},
        {"type": "image", "image": "/etc/hostname"},
        {"type": "image_pil", "image_pil": "x"},
        {"type": "image_embeds", "image_embeds": "x"},
        {"type": "prompt_embeds", "data": "x"},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "text", "text": "a", "uuid": "u", "image_url": "/etc/hostname"},
        {"type": "text", "text": "a", "uuid": "u", "video_url": "/etc/hostname"},
        {"image_url": SMALL, "video_url": "/etc/hostname"},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": ["text"], "text": "a"},
        {},
        7,
    ],
)
@pytest.mark.parametrize("server", [VLLM, TRANSFORMERS], ids=lambda server: server.name)
def test_parts_of_other_kinds_are_refused(behind: Behind, part: Any, server: Any) -> None:
    reply = once(Door(behind, Rules(behind=server)), {"messages": [{"role": "user", "content": [part]}]})

    assert reply.status == 400
    assert reply.error["message"].startswith("messages[0].content[0]")
    assert behind.bodies == []


@pytest.mark.parametrize("messages", ["text", {"content": []}, [7], [{"role": "user", "content": {"type": "text"}}]])
def test_messages_that_are_none_are_refused(door: Door, messages: Any) -> None:
    assert once(door, {"messages": messages}).error["param"] == "messages"


def test_text_passes_in_all_its_forms(door: Door, behind: Behind) -> None:
    parts = [{"type": "text", "text": "a"}, {"text": "b"}, "c", {"type": "refusal", "refusal": "d"}]
    sent = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}, {"role": "tool"}]}

    assert once(door, sent).status == 200
    assert behind.bodies == [sent]


def test_a_picture_may_be_written_in_all_forms_that_the_api_has(door: Door, behind: Behind) -> None:
    parts = [{"type": "image_url", "image_url": SMALL}, {"type": "input_image", "image_url": SMALL}, {"image_url": SMALL}]

    assert once(door, {"messages": [{"role": "user", "content": parts}]}).status == 200
    assert [part["image_url"] for part in behind.bodies[0]["messages"][0]["content"]] == [SMALL] * 3


def test_pictures_are_counted_over_all_messages(behind: Behind) -> None:
    door = Door(behind, Rules(max_images=3))
    body = {"messages": [*chat(SMALL, SMALL)["messages"], *chat(SMALL)["messages"]]}

    assert once(door, body).status == 200
    body["messages"] += chat(SMALL)["messages"]
    assert once(door, body).error["message"] == "messages: 4 pictures; at most 3 in a request"


def test_videos_and_sound_pass_vllm_s_door_if_the_operator_says_so(behind: Behind) -> None:
    door = Door(behind, Rules(other_media=True, max_images=2))
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}

    assert once(door, {"messages": [{"role": "user", "content": [video, sound]}]}).status == 200
    video["video_url"] = {"url": "http://example.org/a.mp4"}
    assert once(door, {"messages": [{"role": "user", "content": [video]}]}).error["param"] == "media"
    video["video_url"] = {"url": "/etc/hostname"}
    assert once(door, {"messages": [{"role": "user", "content": [video]}]}).error["param"] == "scheme"
    assert once(door, {"messages": [{"role": "user", "content": [sound] * 3}]}).error["param"] == "images"


def test_a_picture_that_vllm_knows_already_needs_no_content(behind: Behind) -> None:
    part = {"type": "image_url", "image_url": None, "uuid": "cat-1"}
    body = {"messages": [{"role": "user", "content": [part]}]}

    assert once(Door(behind, Rules(behind=VLLM)), body).status == 200
    assert once(Door(behind, Rules(behind=TRANSFORMERS)), body).error["param"] == "part"
