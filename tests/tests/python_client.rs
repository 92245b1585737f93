//! A client in Python, with code generated from the published .proto files.
//!
//! From 1.57 on, gRPC's C core sends the percent-encoded path of a Unix socket as `:authority`. That is not a valid host, so
//! our HTTP/2 library refuses the request. Before an `@` it accepts percent signs, since it takes that part for a user name.

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use cofferdam_tests::{Cofferdam, Daemon};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs a program with its arguments, and returns what it prints.
fn run(program: &str, paths: &[&Path], arguments: &[&OsStr]) -> Result<String, String> {
    let paths = std::env::join_paths(paths).expect("no path has a colon");
    let ended = Command::new(program).env("PYTHONPATH", paths).args(arguments).output();
    let ended = ended.unwrap_or_else(|error| panic!("{program}: {error}; try: images/setup.sh test"));
    let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
    if ended.status.success() { Ok(String::from_utf8_lossy(&ended.stdout).into_owned()) } else { Err(stderr) }
}

/// Debian's own Python, which has Debian's packages. It searches `paths` first.
fn python(paths: &[&Path], arguments: &[&OsStr]) -> Result<String, String> {
    run("/usr/bin/python3", paths, arguments)
}

/// The modules that docs/clients.md makes of the protocol's archive.
fn generated(cofferdam: &Cofferdam, packages: &Path) -> PathBuf {
    let [archive, to] = ["protocol.tar.gz", "generated"].map(|name| cofferdam.files().join(name));
    let bundle = workspace().join("host/proto/bundle.sh");
    run("/bin/sh", &[], &[bundle.as_os_str(), archive.as_os_str()]).expect("the archive is made");
    let directory = cofferdam.files();
    let unpack = [OsStr::new("-xzf"), archive.as_os_str(), OsStr::new("-C"), directory.as_os_str()];
    run("tar", &[], &unpack).expect("it is an archive");
    fs::create_dir(&to).expect("the directory is new");
    let document = fs::read_to_string(workspace().join("docs/clients.md")).expect("it can be read");
    let files = document.split("--grpc_python_out=. \\\n").nth(1).and_then(|rest| rest.lines().next());
    let mut arguments: Vec<OsString> = ["-m", "grpc_tools.protoc"].map(Into::into).into();
    arguments.push(format!("-I{}", cofferdam.files().join("protocol").display()).into());
    arguments.extend(["--python_out", "--grpc_python_out"].map(|kind| format!("{kind}={}", to.display()).into()));
    arguments.extend(files.expect("the document has the command").split_whitespace().map(Into::into));
    python(&[packages], &arguments.iter().map(OsString::as_os_str).collect::<Vec<_>>()).expect("the files compile");
    to
}

/// Builds with the Python client over the daemon's socket of this name, without options for the channel. Returns gRPC's
/// version. Python searches `packages` first.
fn build_with_python(packages: &Path, socket: &str) -> String {
    let cofferdam = Cofferdam::new();
    let generated = generated(&cofferdam, packages);
    let at = |name: &str| cofferdam.files().join(name);
    let daemon = Daemon::start(&cofferdam, &format!("listen = [{:?}]", at("daemon@localhost")));
    let client = workspace().join("tests/clients/client.py");
    let sockets = [at(socket), at("daemon.sock")];
    let version =
        python(&[packages, &generated], &[client.as_os_str(), sockets[0].as_os_str(), sockets[1].as_os_str()]);
    daemon.end().succeeds();
    version.expect("the client finds what it expects").trim().to_owned()
}

#[test]
fn the_client_of_the_documentation_builds_and_tells_failures() {
    let cofferdam = Cofferdam::new();
    let generated = generated(&cofferdam, Path::new(""));
    let daemon = Daemon::start(&cofferdam, "");
    let client = workspace().join("docs/examples/client.py");
    let lines = fs::read_to_string(&client).expect("it can be read").lines().count();
    assert!(lines <= 30, "{lines} lines");
    let socket = cofferdam.files().join("daemon.sock");
    let build = |script: &str| python(&[&generated], &[client.as_os_str(), socket.as_os_str(), script.as_ref()]);
    assert_eq!(build("echo in the log; echo hello > out"), Ok("hello\n".to_owned()));
    let failed = build("echo in the log; exit 3").expect_err("the script fails");
    assert!(failed.starts_with("in the log\n") && failed.contains("exited with status 3"), "{failed}");
    daemon.end().succeeds();
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
