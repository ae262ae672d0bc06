"""Builds `fused_margin._C`, one library for every Python >= 3.10 and torch >= 2.10, or says why it cannot.

    FUSED_MARGIN_CPU=0            pure Python, no extension
    FUSED_MARGIN_CUDA=auto|0|1    csrc/cuda: if it and an nvcc are there | never | or fail
    FUSED_MARGIN_WERROR=1         a compiler warning is an error

CXX, CUDA_HOME, MAX_JOBS and TORCH_CUDA_ARCH_LIST mean what they mean to torch.utils.cpp_extension.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

# One compiler for the probe, for ninja and for the link, which would take the one that Python was built with.
os.environ.setdefault("CXX", "c++")
# The ninja of this environment, activated or not.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")


def say(message):
    print(f"fused_margin: {message}", file=sys.stderr, flush=True)


def why_pure():
    """Why no extension can be built here, and what to do; "" if it can."""
    if os.environ.get("FUSED_MARGIN_CPU") == "0":
        return "FUSED_MARGIN_CPU=0"
    try:
        import torch
    except (ImportError, OSError) as error:
        return (
            f"this build cannot import torch ({error}); install torch first, then `pip install --no-build-isolation .`"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} lacks the stable ABI; install torch >= 2.10"
    compiler = os.environ["CXX"]
    probe = [*shlex.split(compiler), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    try:
        subprocess.run(probe, input="#include <vector>\n", text=True, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"the C++ compiler {compiler!r} does not work ({error}); install g++ or set CXX"
    return ""


def cuda_home():
    """CUDA_HOME, else what the nvcc on PATH says of itself (it may be a wrapper), else None."""
    nvcc = shutil.which("nvcc")
    if os.environ.get("CUDA_HOME") or nvcc is None:
        return os.environ.get("CUDA_HOME")
    dry_run = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"TOP=(.+)", dry_run)
    if found is None:
        say(f"{nvcc} does not say where it is, so it is left alone; set CUDA_HOME")
    return found and os.path.realpath(found[1])


def cuda_part():
    """(sources, CUDA_HOME) of the CUDA part; ([], None) without one."""
    mode = os.environ.get("FUSED_MARGIN_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"fused_margin: FUSED_MARGIN_CUDA={mode!r}; expected auto, 0 or 1")
    sources = sorted(str(path) for path in Path("csrc/cuda").rglob("*") if path.suffix in (".cpp", ".cu"))
    home = None if mode == "0" else cuda_home()
    if mode == "0":
        why_not = "FUSED_MARGIN_CUDA=0"
    elif not sources:
        why_not = "there are no sources in csrc/cuda"
    elif home is None:
        why_not = "there is no nvcc that works on PATH, and CUDA_HOME is not set"
    else:
        return sources, home
    if mode == "1":
        sys.exit(f"fused_margin: FUSED_MARGIN_CUDA=1, but {why_not}")
    say(f"building without CUDA: {why_not}")
    return [], None


def extension():
    """The arguments of `setup` that build the extension."""
    import torch
    from torch.utils import cpp_extension

    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp") if "cuda" not in path.parts)
    cuda_sources, home = cuda_part()
    includes = cpp_extension.include_paths()
    libraries, library_dirs = ["torch_cpu"], cpp_extension.library_paths()
    if home is not None:
        cpp_extension.CUDA_HOME = home  # torch's CPU wheel sets it to None
        if torch.cuda.device_count() == 0:  # otherwise the GPUs that are here; PTX for those that are not named
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0;10.0;12.0")
        includes.append(f"{home}/include")
        libraries += ["cudart_static", "rt", "dl", "pthread"]
        library_dirs.append(f"{home}/lib64")
    # -isystem, or the warnings of torch's headers are ours. The instruction sets are chosen in the sources.
    system = [flag for path in includes for flag in ("-isystem", path)]
    # The lowest torch that the library loads in, and nothing of torch but the stable ABI.
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    strict = os.environ.get("FUSED_MARGIN_WERROR") == "1"
    warn = ["-Wall", "-Wextra", "-Wno-psabi"] + ["-Werror"] * strict
    warn_nvcc = ["-Werror", "all-warnings"] * strict
    headers = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh"))

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            """With a torch that has no CUDA, ninja is not told which headers a .cu file includes."""
            newest = max(os.path.getmtime(path) for path in headers if not path.startswith("csrc/cpu/"))
            for source in (s for s in cuda_sources if s.endswith(".cu")):
                made = Path(self.build_temp, source).with_suffix(".o")
                if made.exists() and made.stat().st_mtime < newest:
                    made.unlink()
            super().build_extensions()

    library = Extension(
        "fused_margin._C",
        sources + cuda_sources,
        depends=headers,
        libraries=libraries,
        library_dirs=library_dirs,
        extra_compile_args={
            # -g0: some Pythons pass a -g of their own, which only makes the library larger.
            "cxx": ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", *warn, *system, *stable],
            # No contraction to fma: lanes that add up the same numbers must get the same bits.
            "nvcc": ["-O3", "-std=c++17", "--fmad=false", *warn_nvcc, *system, *stable],
        },
        language="c++",
        py_limited_api=True,
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = why_pure()
if reason and os.environ.get("FUSED_MARGIN_CUDA") == "1":
    sys.exit(f"fused_margin: FUSED_MARGIN_CUDA=1, but {reason}")
if reason:
    say(f"pure Python, WITHOUT the C++ kernels: {reason}")
setup(**({} if reason else extension()))
