//! A client in Python, with code generated from the published .proto files.
//!
//! From 1.57 on, gRPC's C core sends the percent-encoded path of a Unix socket as `:authority`. That is not a valid host, so
//! our HTTP/2 library refuses the request. Before an `@` it accepts percent signs, since it takes that part for a user name.

use std::{ffi::OsStr, fs, path::Path, process::Command};

use cofferdam_tests::{Cofferdam, Daemon};

/// Builds with the Python client over the daemon's socket of this name, without options for the channel. Returns gRPC's
/// version. Python searches `packages` first.
fn build_with_python(packages: &Path, socket: &str) -> String {
    let cofferdam = Cofferdam::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let generated = cofferdam.files().join("generated");
    fs::create_dir(&generated).expect("the directory is new");
    let python = |arguments: &[&OsStr]| {
        // Debian's own, which has Debian's packages.
        let mut python = Command::new("/usr/bin/python3");
        let ended = python.env("PYTHONPATH", packages).args(arguments).output();
        let ended = ended.expect("python3 can be started; if it is missing, run: images/setup.sh test");
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "{stderr}\nif a module is missing, run: images/setup.sh test");
        String::from_utf8_lossy(&ended.stdout).trim().to_owned()
    };
    let protoc = ["-m", "grpc_tools.protoc"].map(str::to_owned).into_iter();
    let protoc = protoc.chain([format!("-I{}", root.join("host/proto").display())]);
    let protoc =
        protoc.chain(["--python_out", "--grpc_python_out"].map(|kind| format!("{kind}={}", generated.display())));
    let protoc = protoc.chain(["cofferdam_v1.proto", "snix_build_v1.proto", "castore.proto"].map(str::to_owned));
    let protoc: Vec<_> = protoc.collect();
    python(&protoc.iter().map(OsStr::new).collect::<Vec<_>>());
    let at = |name: &str| cofferdam.files().join(name);
    let daemon = Daemon::start(&cofferdam, &format!("listen = [{:?}]", at("daemon@localhost")));
    let client = root.join("tests/clients/client.py");
    let version =
        python(&[client.as_os_str(), at(socket).as_os_str(), at("daemon.sock").as_os_str(), generated.as_os_str()]);
    daemon.end().succeeds();
    version
}

#[test]
fn a_python_client_of_the_published_protocol_builds() {
    build_with_python(Path::new(""), "daemon.sock");
}

#[test]
fn a_current_grpc_client_builds_over_a_socket_named_at_localhost() {
    let packages = cofferdam_images::cache_dir().join("tools/grpcio");
    let version = build_with_python(&packages, "daemon@localhost");
    let minor: u32 = version.split('.').nth(1).unwrap().parse().unwrap();
    assert!(minor >= 57, "Debian's was found before the one that `images/setup.sh test` installs: {version}");
}
