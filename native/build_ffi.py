"""Write the cffi wrapper (API mode) for adaptrt.h: `build_ffi.py HEADER OUTPUT.c`. Run by CMake."""

import re
import sys
from pathlib import Path

from cffi import FFI

header, output = map(Path, sys.argv[1:])
text = header.read_text(encoding="utf-8")
declarations = text.split("/* cffi: begin */")[1].split("/* cffi: end */")[0]

ffi = FFI()
ffi.cdef(re.sub(r"/\*.*?\*/", "", declarations, flags=re.DOTALL))
ffi.set_source("adaptrt.backends._native", '#include "adaptrt.h"')
ffi.emit_c_code(str(output))
