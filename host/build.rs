//! Generates the wire types, and the descriptors that ProtoJSON needs, from `proto/`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let includes = [root.join("proto"), root.join("castore/proto")];
    for include in &includes {
        println!("cargo::rerun-if-changed={}", include.display());
    }
    let descriptors = protox::compile(["snix_build_v1.proto"], &includes)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("snix_build_v1.binpb"), descriptors.encode_to_vec())?;
    prost_build::Config::new()
        .bytes(["."])
        .extern_path(".snix.castore.v1", "::cofferdam_castore::proto")
        .compile_fds(descriptors)?;
    Ok(())
}
