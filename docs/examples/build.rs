//! Makes the protocol's messages and clients of the files in the directory `protocol`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=protocol");
    let files = protox::compile(["cofferdam_v1.proto", "rpc_blobstore.proto", "rpc_directory.proto"], ["protocol"])?;
    Ok(tonic_prost_build::configure().build_server(false).compile_fds(files)?)
}
