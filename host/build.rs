//! Generates the wire types, the services, and the descriptors that ProtoJSON and reflection need, from `proto/`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let includes = [root.join("proto"), root.join("castore/proto")];
    for include in &includes {
        println!("cargo::rerun-if-changed={}", include.display());
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let compile = |protos: &[&str], name: &str| -> Result<_, Box<dyn Error>> {
        let descriptors = protox::compile(protos, &includes)?;
        fs::write(out.join(name), descriptors.encode_to_vec())?;
        Ok(descriptors)
    };
    let descriptors = compile(&["snix_build_v1.proto"], "snix_build_v1.binpb")?;
    prost_build::Config::new()
        .bytes(["."])
        .extern_path(".snix.castore.v1", "::cofferdam_castore::proto")
        .compile_fds(descriptors)?;

    // Requests stay as they came until they have been checked.
    let services = out.join("grpc");
    fs::create_dir_all(&services)?;
    tonic_prost_build::configure()
        .out_dir(services)
        .bytes(".")
        .extern_path(".snix.castore.v1", "::cofferdam_castore::proto")
        .extern_path(".snix.build.v1", "crate::request::proto")
        .extern_path(".snix.build.v1.BuildRequest", "crate::service::EncodedRequest")
        .extern_path(".tvix.castore.v1.Node", "::cofferdam_castore::proto::Entry")
        .extern_path(".tvix.build.v1.BuildRequest", "crate::service::EncodedRequest")
        .extern_path(".tvix.castore.v1", "::cofferdam_castore::proto")
        .build_transport(false)
        .compile_fds(compile(&["snix_build_v1.proto", "tvix_build_v1.proto", "cofferdam_v1.proto"], "build.binpb")?)?;
    Ok(())
}
