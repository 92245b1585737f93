# GNU hello, built with a toolchain of Debian's packages: `debian` has them unpacked, and `tarball` is hello's source.
{ debian, tarball }:

let
  packages = builtins.path { path = debian; name = "debian-packages"; };
  source = builtins.path { path = tarball; name = "hello.tar.gz"; };

  build = name: builder: script: derivation {
    inherit name builder;
    system = "x86_64-linux";
    args = [ "-euc" script ];
  };

  # Programs of the packages name a loader that a build doesn't have. Until they name another one, the loader runs them.
  bootstrap = name: script: build name "/bin/sh" ''
    libraries=${packages}/usr/lib/x86_64-linux-gnu
    run() {
      program=${packages}/usr/bin/$1
      shift
      $libraries/ld-linux-x86-64.so.2 --library-path $libraries $program "$@"
    }
    ${script}
  '';

  # The part of the C library that programs need at run time.
  glibc = bootstrap "glibc" ''
    run mkdir -p $out/lib
    run cp -L $libraries/ld-linux-x86-64.so.2 $libraries/libc.so.6 $libraries/libm.so.6 $out/lib
  '';

  loader = "${glibc}/lib/ld-linux-x86-64.so.2";

  toolchain = bootstrap "toolchain" ''
    run mkdir -p $out/lib
    run cp -rs ${packages}/usr/lib/gcc $out/lib
    run chmod -R u+w $out/lib
    cd ${packages}/usr/lib/gcc
    for program in */*/cc1 */*/collect2; do
      run cp --remove-destination $program $out/lib/gcc/$program
    done
    run cp -r ${packages}/usr/bin $out
    run chmod -R u+w $out
    # For optimizing while linking, and large.
    run rm -f $out/bin/*-lto-dump*
    run patchelf --set-interpreter ${loader} --force-rpath --set-rpath ${glibc}/lib:$libraries \
      $(run grep -rlP '^\x7fELF' $out)

    # The linker's, whose other files are those of the packages.
    echo "GROUP ( ${glibc}/lib/libc.so.6 $libraries/libc_nonshared.a AS_NEEDED ( ${loader} ) )" > $out/lib/libc.so
  '';

  cc = "gcc --sysroot=${packages} -L${toolchain}/lib -Wl,--dynamic-linker=${loader},-rpath=${glibc}/lib";

  hello = build "hello" "${toolchain}/bin/bash" ''
    export PATH=${toolchain}/bin CONFIG_SHELL=${toolchain}/bin/bash
    tar -xf ${source} --strip-components=1
    # Without -g, which would have it refer to headers.
    bash ./configure --prefix=$out --disable-dependency-tracking CC="${cc}" CFLAGS=-O2
    make -j$NIX_BUILD_CORES
    make check
    make install
  '';

  greeting = build "greeting" "/bin/sh" "${hello}/bin/hello > $out";
in
{
  inherit glibc greeting hello;
}
