//! Compiles `proto/castore.proto` without `protoc`, to Rust and to a descriptor set.

use std::{env, fs, io, path::Path};

use prost::Message as _;

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=proto/castore.proto");
    let descriptors = protox::compile(["castore.proto"], ["proto"]).map_err(io::Error::other)?;
    let out_dir = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    fs::write(Path::new(&out_dir).join("castore.binpb"), descriptors.encode_to_vec())?;
    prost_build::Config::new().bytes(["."]).compile_fds(descriptors)
}
