#!/bin/sh
# Builds the oracle that agx.py uses, under ${AGX_HOME:-$HOME/.cache/agx}: a Debian trixie root with
# clang and the SPIR-V translator, Mesa's AGX compiler with edit_mesa.py, and MLX's kernel headers.
# Needs Debian with apt, pip and root. What is there already is kept; a changed edit_mesa.py is built anew.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
home=${AGX_HOME:-$HOME/.cache/agx}
root=$home/root
log=$home/setup.log
mlx=0.32.4

mkdir -p "$home"
: > "$log"
trap 'status=$?; [ $status = 0 ] || { tail -n 20 "$log" >&2; echo "setup.sh: failed, see $log" >&2; }' EXIT

say() { echo "setup.sh: $*"; }
quietly() { nice -n 10 "$@" >> "$log" 2>&1; }
inside() { quietly env -u PYTHONPATH LC_ALL=C DEBIAN_FRONTEND=noninteractive chroot "$root" "$@"; }
# The mirror that this machine's apt takes Debian from.
mirror() {
  apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Identifier: Packages' | sed -n 's/^Debian //p' | head -n 1
}

if [ ! -e "$root/.packages" ]; then
  say "Debian trixie and its compilers"
  [ -n "$(mirror)" ] || quietly apt-get update
  if ! command -v debootstrap > /dev/null; then
    quietly apt-get update
    quietly apt-get install -y --no-install-recommends debootstrap
  fi
  url=$(mirror)
  [ -n "$url" ] || { echo "no Debian mirror in apt's settings" >> "$log"; exit 1; }
  rm -rf "$root"
  quietly debootstrap --variant=minbase trixie "$root" "$url"
  printf 'deb %s trixie main\ndeb-src %s trixie main\n' "$url" "$url" > "$root/etc/apt/sources.list"
  inside apt-get update
  inside apt-get install -y --no-install-recommends \
    clang-19 llvm-19 llvm-19-dev libclang-19-dev libclc-19 libclc-19-dev llvm-spirv-19 libllvmspirvlib-19-dev \
    spirv-tools glslang-tools meson ninja-build g++ pkg-config bison flex dpkg-dev python3-mako python3-yaml \
    python3-packaging python3-pycparser zlib1g-dev libexpat1-dev libdrm-dev libudev-dev libelf-dev
  inside apt-get clean
  touch "$root/.packages"
fi

edits=$(sha256sum < "$here/edit_mesa.py")
if [ "$(cat "$root/.mesa" 2> /dev/null)" != "$edits" ]; then
  say "Mesa's AGX compiler"
  build=$root/build
  rm -rf "$build"
  mkdir -p "$build/mesa"
  inside sh -c 'cd /build && apt-get source --download-only mesa'
  tar xf "$build"/mesa_25.0.*.orig.tar.xz -C "$build/mesa" --strip-components 1
  quietly python3 "$here/edit_mesa.py" "$build/mesa"
  inside sh -c 'cd /build/mesa && PATH=/usr/lib/llvm-19/bin:$PATH && meson setup build --buildtype=release \
    -Doptimization=1 -Db_ndebug=true -Dgallium-drivers=asahi -Dtools=asahi,drm-shim -Dvulkan-drivers= \
    -Dplatforms= -Dglx=disabled -Degl=disabled -Dgbm=disabled -Dopengl=false -Dgles1=disabled -Dgles2=disabled \
    -Dllvm=enabled -Dshared-llvm=enabled -Dgallium-va=disabled -Dgallium-vdpau=disabled -Dvideo-codecs= \
    -Dvalgrind=disabled -Dlibunwind=disabled -Dlmsensors=disabled -Dselinux=false -Dxmlconfig=disabled \
    -Dzstd=disabled -Dbuild-tests=false &&
    ninja -C build src/asahi/clc/asahi_clc && install -s build/src/asahi/clc/asahi_clc /usr/local/bin/agx_compile'
  rm -rf "$build"
  echo "$edits" > "$root/.mesa"
fi

if [ ! -e "$root/mlx/.$mlx" ]; then
  say "MLX's kernel headers"
  rm -rf "$root/mlx" "$home/wheel"
  quietly python3 -m pip download --no-deps --only-binary=:all: --platform macosx_14_0_arm64 \
    -d "$home/wheel" "mlx-metal==$mlx"
  quietly python3 - "$home/wheel" "$root/mlx" <<'PYTHON'
import pathlib, re, sys, zipfile
# What C++ has no word for: most attributes, and vectors as float2(x, y), which are float2{x, y} there.
attribute = r" ?\[\[(?!function_constant)[^\]]*\]\]"
vector = r"\b((?:u?(?:short|int|long)|half|float)[234])\(((?:[^()]|\([^()]*\))*,(?:[^()]|\([^()]*\))*)\)"
with zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl"))) as wheel:
    for name in wheel.namelist():
        if "/backend/metal/kernels/steel/" in name and name.endswith(".h"):
            target = pathlib.Path(sys.argv[2], name.removeprefix("mlx/include/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            text = re.sub(attribute, "", wheel.read(name).decode())
            target.write_text(re.sub(vector, r"\1{\2}", text))
PYTHON
  rm -rf "$home/wheel"
  touch "$root/mlx/.$mlx"
fi

mkdir -p "$root/scratch"
say "ready: $home"
