//! The examples for programs and CI in docs/examples do what docs/clients.md says.

use std::{env, ffi::OsStr, fs, path::PathBuf, process::Command};

use cofferdam_tests::{Cofferdam, Daemon, program};
use serde_json::Value;
use tokio::runtime::Runtime;

fn example(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/examples").join(name)
}

#[test]
fn the_request_in_protojson_builds() {
    let cofferdam = Cofferdam::new();
    let request = fs::read_to_string(example("request.json")).unwrap();
    let build = cofferdam.build().plain().flag("--out", cofferdam.files().join("result"));
    build.request_text(&request).succeeds();
    assert_eq!(fs::read_to_string(cofferdam.files().join("result/build/out")).unwrap(), "hello, world\n");
}

#[test]
fn the_client_in_rust_builds_and_tells_failures() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let runtime = Runtime::new().unwrap();
    let socket = cofferdam.files().join("daemon.sock");
    let build = |script| runtime.block_on(cofferdam_example_client::build(socket.to_str().unwrap(), script));
    assert_eq!(build("echo in the log; echo hello > out").unwrap(), b"hello\n");
    let failed = build("exit 3").unwrap_err().to_string();
    assert!(failed.contains("exited with status 3"), "{failed}");
    daemon.end().succeeds();
}

/// A YAML file as JSON. Python's parser is the one of PyYAML.
fn yaml(name: &str) -> Value {
    let script = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))";
    let parsed = Command::new("/usr/bin/python3").args(["-c", script]).arg(example(name)).output();
    let parsed = parsed.expect("python3 can be started; if it is missing, run: images/setup.sh test");
    let stderr = String::from_utf8_lossy(&parsed.stderr);
    assert!(parsed.status.success(), "{stderr}\nif a module is missing, run: images/setup.sh test");
    serde_json::from_slice(&parsed.stdout).expect("Python writes JSON")
}

/// Runs the lines as a runner does, in a checkout with a `build.sh` and beside a daemon, twice. The job's variable must name a
/// daemon, and its artifact must be what the script made.
fn runs(script: &str, job_daemon: &Value, artifact: &Value) {
    let [server, cofferdam] = [Cofferdam::new(), Cofferdam::new()];
    let daemon = Daemon::start(&server, "");
    cofferdam.file("build.sh", "read -r word < source && echo \"made of $word\" > report\n");
    cofferdam.file("source", "this\n");
    assert_eq!(job_daemon, "grpc+unix:///run/cofferdam/daemon.sock", "the daemon of the unit");
    let addr = daemon.addr();
    let directories = program().parent().map(PathBuf::from).into_iter();
    let inherited = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(directories.chain(env::split_paths(&inherited))).expect("no directory has a colon");
    let variables = [("COFFERDAM_DAEMON", OsStr::new(&addr)), ("PATH", path.as_os_str())];
    let run = || cofferdam.start_program("/bin/sh".as_ref(), ["-ec", script].map(OsStr::new), &variables).end();
    for _ in 0..2 {
        run().succeeds();
        let report = cofferdam.files().join(artifact.as_str().expect("it is a path"));
        assert_eq!(fs::read_to_string(report).expect("it was made"), "made of this\n");
    }
    cofferdam.file("build.sh", "echo said; exit 3\n");
    run().exits_with(1).says("said").says("status 3");
    daemon.end().succeeds();
}

#[test]
fn the_steps_for_github_actions_build() {
    let job = &yaml("github-actions.yml")["jobs"]["build"];
    let steps = job["steps"].as_array().unwrap();
    let script: Vec<_> = steps.iter().filter_map(|step| step["run"].as_str()).collect();
    runs(&script.join("\n"), &job["env"]["COFFERDAM_DAEMON"], &steps.last().unwrap()["with"]["path"]);
}

#[test]
fn the_script_for_gitlab_builds() {
    let job = &yaml("gitlab-ci.yml")["build"];
    let script: Vec<_> = job["script"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
    runs(&script.join("\n"), &job["variables"]["COFFERDAM_DAEMON"], &job["artifacts"]["paths"][0]);
}
