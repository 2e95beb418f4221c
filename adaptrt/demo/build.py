"""Pack what recipe.py trained into the demo file: `python -m adaptrt.demo.build TRAINED_DIR OUT.adrt`.

It does what a user would: convert the base, import each PEFT folder, put all into one file, and add the prompt that
`adaptrt run demo` continues when it is given none.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from adaptrt.adapters.base import open_base
from adaptrt.adapters.storage import write_adapter
from adaptrt.convert.base import ConvertOptions
from adaptrt.convert.hf import HfImporter
from adaptrt.convert.peft import import_peft
from adaptrt.format import Writer, open_file
from adaptrt.plugins import load_registry

SAMPLE_PROMPT = "The king looked at the sea and said"


def build(trained: Path, out: Path) -> None:
    """Write `out` from `trained`/base and `trained`/adapters/*."""
    registry = load_registry()
    with tempfile.TemporaryDirectory() as folder:
        base_path = Path(folder) / "base.adrt"
        HfImporter().convert(trained / "base", base_path, ConvertOptions(name="demo"), lambda *_: None)
        with open_file(base_path) as file:
            base = open_base(file, registry.architectures)
            with Writer(out, {**file.metadata, "general.sample_prompt": SAMPLE_PROMPT}) as writer:
                for section in file.sections:
                    writer.copy_section(file, section)
                for source in sorted((trained / "adapters").iterdir()):
                    adapter = import_peft(source, registry.variants, base)
                    write_adapter(writer, replace(adapter, base=base.record()))


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
