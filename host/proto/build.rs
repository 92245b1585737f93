//! Compiles the `.proto` files without `protoc`: messages and services to Rust, and descriptors for ProtoJSON and
//! reflection.

use std::{env, fs, io, path::Path};

use prost::Message as _;

const CASTORE: [&str; 3] = ["rpc_blobstore.proto", "rpc_directory.proto", "tvix_castore.proto"];

const BUILD: [&str; 3] = ["snix_build_v1.proto", "tvix_build_v1.proto", "cofferdam_v1.proto"];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=castore.proto");
    for proto in CASTORE.iter().chain(&BUILD) {
        println!("cargo::rerun-if-changed={proto}");
    }
    let out_dir = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    let out_dir = Path::new(&out_dir);
    let compile = |protos: &[&str]| protox::compile(protos, ["."]).map_err(io::Error::other);
    fs::write(out_dir.join("castore.binpb"), compile(&CASTORE)?.encode_to_vec())?;
    fs::write(out_dir.join("build.binpb"), compile(&BUILD)?.encode_to_vec())?;

    let all = compile(&[CASTORE, BUILD].concat())?;
    prost_build::Config::new().bytes(["."]).compile_fds(all.clone())?;

    // Large messages stay as they came until the receiver has checked how much there is. tvix's messages have the same
    // bytes as those of snix.
    let services = out_dir.join("grpc");
    fs::create_dir_all(&services)?;
    tonic_prost_build::configure()
        .out_dir(services)
        .bytes(".")
        .extern_path(".snix.castore.v1", "crate::snix::castore::v1")
        .extern_path(".snix.castore.v1.Directory", "crate::EncodedDirectory")
        .extern_path(".tvix.castore.v1", "crate::snix::castore::v1")
        .extern_path(".tvix.castore.v1.Node", "crate::snix::castore::v1::Entry")
        .extern_path(".snix.build.v1", "crate::snix::build::v1")
        .extern_path(".snix.build.v1.BuildRequest", "crate::EncodedRequest")
        .extern_path(".tvix.build.v1.BuildRequest", "crate::EncodedRequest")
        .extern_path(".cofferdam.v1.Network", "crate::EncodedNetwork")
        .skip_debug([".cofferdam.v1.Secret"])
        .build_transport(false)
        .compile_fds(all)
}
