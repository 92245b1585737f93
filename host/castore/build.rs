//! Compiles `proto/` without `protoc`: messages and services to Rust, all of it to descriptor sets.

use std::{env, fs, io, path::Path};

use prost::Message as _;

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=proto");
    let out_dir = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    let out_dir = Path::new(&out_dir);
    let compile = |protos: &[&str], name: &str| {
        let descriptors = protox::compile(protos, ["proto"]).map_err(io::Error::other)?;
        fs::write(out_dir.join(name), descriptors.encode_to_vec())?;
        io::Result::Ok(descriptors)
    };
    compile(&["tvix_castore.proto"], "tvix_castore.binpb")?;
    let descriptors = compile(&["rpc_blobstore.proto", "rpc_directory.proto"], "castore.binpb")?;
    prost_build::Config::new().bytes(["."]).compile_fds(descriptors.clone())?;

    let services = out_dir.join("grpc");
    fs::create_dir_all(&services)?;
    tonic_prost_build::configure()
        .out_dir(services)
        .extern_path(".snix.castore.v1", "crate::proto")
        .extern_path(".snix.castore.v1.Directory", "crate::grpc::EncodedDirectory")
        .build_transport(false)
        .compile_fds(descriptors)
}
