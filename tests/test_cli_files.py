"""convert, inspect, verify, pack and adapter; each wrong input is one line and leaves nothing behind."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import Outcome, adaptrt_cli, adaptrt_process
from helpers.oracle import peft_folder
from helpers.tiny import tiny_folder
from safetensors.numpy import load_file, save_file

from adaptrt.adapters.storage import PREFIX, read_adapter
from adaptrt.convert.peft import write_adapter_file
from adaptrt.format import open_file

GREEDY = ("-p", "Once", "-n", "12", "--temp", "0", "--precision", "exact", "--threads", "2")


@dataclass(frozen=True)
class Made:
    """A model and two adapters, as folders and converted by the command line."""

    folder: Path
    model: Path
    poet_folder: Path
    poet: Path
    clerk: Path
    other: Path  # another model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("made")
    folder = tiny_folder(path / "hf")
    tiny_folder(path / "hf-other", seed=7)
    peft_folder(path / "poet", folder, 1)
    peft_folder(path / "clerk", folder, 2, r=3)
    for source, *options in (
        ["hf"],
        ["hf-other"],
        ["poet", "--base", path / "hf.adrt"],
        ["clerk", "--base", path / "hf.adrt"],
    ):
        outcome = adaptrt_cli("convert", path / source, "-o", path / f"{source}.adrt", *options)
        assert outcome.code == 0, outcome.err
        assert outcome.out == ""
    return Made(
        folder,
        path / "hf.adrt",
        path / "poet",
        path / "poet.adrt",
        path / "clerk.adrt",
        path / "hf-other.adrt",
    )


def text_with(model: Path, *adapters: object) -> str:
    options = [word for adapter in adapters for word in ("-a", str(adapter))]
    outcome = adaptrt_cli("run", model, *GREEDY, *options)
    assert outcome.code == 0, outcome.err
    return outcome.out


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What works


def test_conversion_is_reproducible_wherever_it_happens(made: Made, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(made.folder, tmp_path / "another name")
    assert adaptrt_cli("convert", elsewhere, "-o", tmp_path / "again.adrt").code == 0
    assert (tmp_path / "again.adrt").read_bytes() == made.model.read_bytes()


def test_an_adapter_acts_the_same_from_folder_file_pack_and_inside(made: Made, tmp_path: Path) -> None:
    expected = text_with(made.model, f"{made.poet_folder}:0.7")
    assert expected != text_with(made.model)
    assert text_with(made.model, f"{made.poet}:0.7") == expected

    packed = tmp_path / "packed.adrt"
    outcome = adaptrt_cli("pack", packed, made.model, made.poet, made.clerk)
    assert outcome.code == 0, outcome.err
    assert text_with(packed, "poet:0.7") == expected
    assert text_with(packed, "clerk", "poet") == text_with(made.model, made.clerk, made.poet)

    grown = Path(shutil.copy(made.model, tmp_path / "grown.adrt"))
    before = grown.read_bytes()
    for source, *name in ([made.poet], [made.poet_folder, "--name", "bard"]):
        outcome = adaptrt_cli("adapter", "add", grown, source, *name)
        assert outcome.code == 0, outcome.err
    assert text_with(grown, "poet:0.7") == text_with(grown, "bard:0.7") == expected
    assert grown.read_bytes()[4096 : len(before)] == before[4096:]  # the base has not moved or changed


def test_adapter_list_and_remove(made: Made, tmp_path: Path) -> None:
    packed = tmp_path / "packed.adrt"
    assert adaptrt_cli("pack", packed, made.model, made.poet, made.clerk).code == 0
    listed = json.loads(adaptrt_cli("adapter", "list", packed, "--json").out)
    assert [(item["name"], item["variant"], len(item["targets"])) for item in listed] == [
        ("poet", "lora", 14),
        ("clerk", "lora", 14),
    ]
    assert {target["rank"] for target in listed[1]["targets"]} == {3}
    assert adaptrt_cli("adapter", "remove", packed, "poet").code == 0
    (line,) = adaptrt_cli("adapter", "list", packed).out.splitlines()
    assert line.startswith("clerk: lora; ")
    assert adaptrt_cli("verify", packed).out == f"{packed}: ok\n"


def test_inspect(made: Made) -> None:
    model = json.loads(adaptrt_cli("inspect", made.model, "--tensors", "--json").out)
    adapter = json.loads(adaptrt_cli("inspect", made.poet, "--json").out)
    assert model["bytes"] == made.model.stat().st_size
    assert model["metadata"]["general.architecture"] == "llama"
    assert adapter["adapters"][0]["base"]["fingerprint"] == model["fingerprint"]
    (base,) = [section for section in model["sections"] if section["name"] == "base"]
    shapes = {tensor["name"]: tensor["shape"] for tensor in base["tensors"]}
    config = json.loads((made.folder / "config.json").read_text())
    assert shapes["blk.1.ffn_down.weight"] == [config["hidden_size"], config["intermediate_size"]]
    words = adaptrt_cli("inspect", made.model, "--tensors").out
    assert model["fingerprint"] in words
    assert "blk.1.ffn_down.weight nf4 [64, 160]" in words


def test_what_a_file_says_does_not_steer_the_terminal(made: Made, tmp_path: Path) -> None:
    steering = "\x1b[2J\u202e\x07"
    with open_file(made.poet) as file:
        adapter = read_adapter(file, PREFIX + "poet")
    base = {**adapter.base, "name": steering}
    odd = replace(adapter, notes=(f"read {steering} this",), base=base, config_text=steering)
    write_adapter_file(tmp_path / "odd.adrt", odd)
    for command in (["inspect"], ["adapter", "list"], ["adapter", "add", made.model, "--name", steering]):
        outcome = adaptrt_cli(*command, tmp_path / "odd.adrt")
        assert not set(outcome.out + outcome.err) & set(steering.removeprefix("\x1b[2J") + "\x1b")
    assert r"read \x1b[2J\u202e\x07 this" in adaptrt_cli("inspect", tmp_path / "odd.adrt").out


def test_verify_names_what_is_damaged(made: Made, tmp_path: Path) -> None:
    assert adaptrt_cli("verify", made.model).out == f"{made.model}: ok\n"
    data = bytearray(made.model.read_bytes())
    data[5000] ^= 1
    damaged = tmp_path / "damaged.adrt"
    damaged.write_bytes(data)
    outcome = adaptrt_cli("verify", damaged)
    assert outcome.code == 1
    assert outcome.out.startswith(f"{damaged}: section 'base': tensor ")


def test_force_replaces_but_never_the_source(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out.adrt"
    out.write_bytes(b"old")
    refused = adaptrt_cli("convert", made.folder, "-o", out)
    assert (refused.code, refused.error) == (1, f"{out}: exists; --force replaces it")
    assert out.read_bytes() == b"old"
    assert adaptrt_cli("convert", made.folder, "-o", out, "--force").code == 0
    assert out.read_bytes() == made.model.read_bytes()
    for target in (made.folder / "config.json", made.folder):
        refused = adaptrt_cli("convert", made.folder, "-o", target, "--force")
        assert (refused.code, refused.error) == (
            1,
            f"{target}: is part of the input {made.folder} and will not be replaced",
        )
    refused = adaptrt_cli("convert", made.poet_folder, "-o", made.model, "--base", made.model, "--force")
    assert (refused.code, refused.error) == (
        1,
        f"{made.model}: is part of the input {made.model} and will not be replaced",
    )


# What does not


Wrong = Callable[[Made, Path], list[object]]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def not_a_model(made: Made, path: Path) -> list[object]:
    (path / "folder").mkdir()
    return ["convert", path / "folder", "-o", path / "out.adrt"]


def missing_source(made: Made, path: Path) -> list[object]:
    return ["convert", path / "nowhere", "-o", path / "out.adrt"]


def missing_shard(made: Made, path: Path) -> list[object]:
    folder = shutil.copytree(made.folder, path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[1:]}, folder / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    places[names[0]] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return ["convert", folder, "-o", path / "out.adrt"]


def truncated_safetensors(made: Made, path: Path) -> list[object]:
    folder = shutil.copytree(made.folder, path / "truncated")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(50_000)
    return ["convert", folder, "-o", path / "out.adrt"]


def adapter_of_another_base(made: Made, path: Path) -> list[object]:
    return ["run", made.other, "-p", "x", "-a", made.poet]


def packing_an_adapter_of_another_base(made: Made, path: Path) -> list[object]:
    return ["pack", path / "out.adrt", made.other, made.poet]


def adding_an_adapter_of_another_base(made: Made, path: Path) -> list[object]:
    return ["adapter", "add", shutil.copy(made.other, path / "copy.adrt"), made.poet]


def adding_an_adapter_that_cannot_run(made: Made, path: Path) -> list[object]:
    folder = shutil.copytree(made.poet_folder, path / "huge")
    edit_json(folder / "adapter_config.json", lora_alpha=1e300)
    return ["adapter", "add", shutil.copy(made.model, path / "copy.adrt"), folder]


def adapter_with_an_unknown_key(made: Made, path: Path) -> list[object]:
    folder = shutil.copytree(made.poet_folder, path / "odd")
    tensors = load_file(folder / "adapter_model.safetensors")
    (first, *_) = sorted(tensors)
    tensors[first.replace("lora_A", "lora_X")] = tensors[first]
    save_file(tensors, folder / "adapter_model.safetensors")
    return ["convert", folder, "-o", path / "out.adrt", "--base", made.model]


def adapter_with_an_unknown_option(made: Made, path: Path) -> list[object]:
    folder = shutil.copytree(made.poet_folder, path / "odd")
    edit_json(folder / "adapter_config.json", use_magic=True)
    return ["run", made.model, "-p", "x", "-a", folder]


def qalora_without_a_plugin(made: Made, path: Path) -> list[object]:
    folder = peft_folder(path / "qalora", made.folder)
    edit_json(folder / "adapter_config.json", use_qalora=True)
    return ["convert", folder, "-o", path / "out.adrt", "--base", made.model]


def adapter_without_its_base(made: Made, path: Path) -> list[object]:
    return ["convert", made.poet_folder, "-o", path / "out.adrt"]


def unknown_adapter(made: Made, path: Path) -> list[object]:
    return ["run", made.model, "-p", "x", "-a", "nobody"]


def link_to_itself(made: Made, path: Path) -> list[object]:
    (path / "loop").symlink_to(path / "loop")
    return ["run", made.model, "-p", "x", "-a", path / "loop"]


def removing_an_unknown_adapter(made: Made, path: Path) -> list[object]:
    return ["adapter", "remove", shutil.copy(made.model, path / "copy.adrt"), "nobody"]


def adding_the_same_name_twice(made: Made, path: Path) -> list[object]:
    packed = path / "packed.adrt"
    assert adaptrt_cli("pack", packed, made.model, made.poet).code == 0
    return ["adapter", "add", packed, made.poet]


def packing_the_same_name_twice(made: Made, path: Path) -> list[object]:
    return ["pack", path / "out.adrt", made.model, made.poet, made.poet]


def packing_over_a_file(made: Made, path: Path) -> list[object]:
    (path / "out.adrt").write_bytes(b"precious")
    return ["pack", path / "out.adrt", made.model, made.poet]


def packing_a_model_as_adapter(made: Made, path: Path) -> list[object]:
    return ["pack", path / "out.adrt", made.model, made.other]


def scale_nan(made: Made, path: Path) -> list[object]:
    return ["run", made.model, "-p", "x", "-a", f"{made.poet}:nan"]


def prompt_too_long(made: Made, path: Path) -> list[object]:
    return ["run", made.model, "-p", "x" * 400]


def no_prompt(made: Made, path: Path) -> list[object]:
    return ["run", made.model]


def empty_prompt(made: Made, path: Path) -> list[object]:
    return ["run", made.model, "-p", ""]


def missing_prompt_file(made: Made, path: Path) -> list[object]:
    return ["run", made.model, "-f", path / "nowhere.txt"]


def binary_prompt_file(made: Made, path: Path) -> list[object]:
    (path / "binary").write_bytes(b"ab\xff")
    return ["run", made.model, "-f", path / "binary"]


def unknown_backend(made: Made, path: Path) -> list[object]:
    return ["run", made.model, "-p", "x", "--backend", "abacus"]


def adapter_as_model(made: Made, path: Path) -> list[object]:
    return ["run", made.poet, "-p", "x"]


def text_as_model(made: Made, path: Path) -> list[object]:
    return ["run", made.folder / "config.json", "-p", "x"]


def missing_model(made: Made, path: Path) -> list[object]:
    return ["run", path / "nowhere.adrt", "-p", "x"]


def truncated_model(made: Made, path: Path) -> list[object]:
    (path / "cut.adrt").write_bytes(made.model.read_bytes()[:9000])
    return ["inspect", path / "cut.adrt"]


def context_of_one(made: Made, path: Path) -> list[object]:
    return ["eval", made.model, "--text", made.folder / "config.json", "--ctx", "1"]


WRONG: dict[Wrong, str] = {
    not_a_model: "{path}/folder: not a model or adapter folder",
    missing_source: "{path}/nowhere: no such file or folder",
    missing_shard: "model-00002-of-00002.safetensors",
    truncated_safetensors: "model.safetensors",
    adapter_of_another_base: "base",
    packing_an_adapter_of_another_base: "base",
    adding_an_adapter_of_another_base: "base",
    adding_an_adapter_that_cannot_run: "expected a finite float32",
    adapter_with_an_unknown_key: "lora_X",
    adapter_with_an_unknown_option: "use_magic",
    qalora_without_a_plugin: "use_qalora",
    adapter_without_its_base: "--base",
    unknown_adapter: "adapter 'nobody': no such file or folder, and not inside {made}/hf.adrt",
    link_to_itself: "adapter '{path}/loop': no such file or folder",
    removing_an_unknown_adapter: "nobody",
    adding_the_same_name_twice: "poet",
    packing_the_same_name_twice: "poet",
    packing_over_a_file: "{path}/out.adrt: exists",
    packing_a_model_as_adapter: "{made}/hf-other.adrt: found 0 adapters, expected one",
    scale_nan: "scale is 'nan', expected a finite number",
    prompt_too_long: "prompt: found 401 tokens, expected at most 128, the context length",
    no_prompt: "there is no prompt",
    empty_prompt: "the prompt is empty",
    missing_prompt_file: "{path}/nowhere.txt: No such file or directory",
    binary_prompt_file: "{path}/binary: byte 2 is not UTF-8 text",
    unknown_backend: "backend 'abacus': not installed; installed: ",
    adapter_as_model: "{made}/poet.adrt: holds no base model",
    text_as_model: "{made}/hf/config.json: not an adrt file",
    missing_model: "{path}/nowhere.adrt: No such file or directory",
    truncated_model: "{path}/cut.adrt: ",
    context_of_one: "ctx: found 1, expected 2 to 128",
}


def expect_one_line(outcome: Outcome, message: str, code: int = 1) -> None:
    assert outcome.code == code, outcome.err
    assert message in outcome.error
    assert outcome.out == ""
    assert all(line.startswith("adaptrt: ") for line in outcome.err.splitlines()), outcome.err


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_input_is_one_line_and_changes_nothing(made: Made, tmp_path: Path, wrong: Wrong) -> None:
    args = wrong(made, tmp_path)
    before = listing(tmp_path)
    message = WRONG[wrong].format(path=tmp_path, made=made.model.parent)
    expect_one_line(adaptrt_cli(*args), message, code=2 if wrong in (no_prompt, empty_prompt) else 1)
    assert listing(tmp_path) == before


def small_files_only() -> None:
    """No file of this process may grow beyond 40 kB: what a full disk does to a writer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


@pytest.mark.parametrize("command", ["convert", "pack", "adapter", "merge"])
def test_a_full_disk_is_one_line_and_leaves_nothing(made: Made, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out.adrt"
    args = {
        "convert": ["convert", made.folder, "-o", out],
        "pack": ["pack", out, made.model, made.poet],
        "adapter": ["adapter", "add", out, made.poet],
        "merge": ["merge", made.model, made.poet, "--to", "hf", "-o", out],
    }[command]
    if command == "adapter":
        shutil.copy(made.model, out)
    before = listing(tmp_path)
    expect_one_line(adaptrt_process(*args, setup=small_files_only), "out.adrt: File too large")
    assert listing(tmp_path) == before


def obey_permissions() -> None:
    """Take from root what lets it ignore permission bits (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    if os.geteuid() == 0:
        prctl_capbset_drop = 24
        for capability in (1, 2):
            if ctypes.CDLL(None).prctl(prctl_capbset_drop, capability, 0, 0, 0):
                raise OSError("prctl")


def test_an_unreadable_file_is_one_line(made: Made, tmp_path: Path) -> None:
    model = Path(shutil.copy(made.model, tmp_path / "locked.adrt"))
    model.chmod(0)
    outcome = adaptrt_process("run", model, "-p", "x", setup=obey_permissions)
    expect_one_line(outcome, f"{model}: Permission denied")


@pytest.mark.parametrize("command", ["convert", "pack", "adapter"])
def test_no_write_permission_is_one_line(made: Made, tmp_path: Path, command: str) -> None:
    model = Path(shutil.copy(made.model, tmp_path / "model.adrt"))
    model.chmod(0o444)
    tmp_path.chmod(0o555)
    out = tmp_path / "out.adrt"
    args = {
        "convert": ["convert", made.folder, "-o", out],
        "pack": ["pack", out, model, made.poet],
        "adapter": ["adapter", "add", model, made.poet],
    }[command]
    before = listing(tmp_path)
    outcome = adaptrt_process(*args, setup=obey_permissions)
    expect_one_line(outcome, f"{model if command == 'adapter' else out}: Permission denied")
    assert listing(tmp_path) == before
    tmp_path.chmod(0o755)
