//! Signed statements of how outputs were made, from a daemon to a verification without it.

use std::{fs, os::unix::fs::PermissionsExt as _};

use cofferdam_tests::{Cofferdam, Daemon};
use serde_json::Value;

#[test]
fn a_success_has_a_statement_that_verifies_offline() {
    let cofferdam = Cofferdam::new();
    let input = cofferdam.file("input", "an input\n");
    let daemon = Daemon::start(&cofferdam, "");
    let built = cofferdam.build().on(&daemon).input("in", &input).output("build/out").exported();
    let built = built.shell("mkdir out; cp /inputs/in out/copy; ln -s copy out/link");
    cofferdam.build().on(&daemon).output("build/out").shell("exit 4").build_fails("exit_code");
    let addr = daemon.addr();
    let builds = |arguments: &[&str]| cofferdam.command(["builds", "--daemon", &addr].iter().chain(arguments));
    let list = builds(&["list", "--json"]).succeeds().stdout;
    let ids: Vec<_> = list.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].clone()).collect();
    let [Value::String(failed), Value::String(succeeded)] = &ids[..] else { panic!("{list}") };
    builds(&["provenance", failed]).exits_with(2).says("it made nothing");
    let envelope = builds(&["provenance", succeeded]).succeeds().stdout;
    let key = cofferdam.file("key.pem", builds(&["provenance", "--public-key"]).succeeds().stdout);
    daemon.end().succeeds();

    let output = built.exported("build/out");
    let out = output.ancestors().nth(2).unwrap();
    let verify = |envelope: &str, key: &std::path::Path, more: &[&str]| {
        let statement = cofferdam.file("statement.json", envelope);
        let arguments = ["verify", "--json", "--key", key.to_str().unwrap(), statement.to_str().unwrap()];
        cofferdam.command(arguments.iter().chain(more))
    };
    let with_outputs = ["--out", out.to_str().unwrap()];
    let statement = verify(&envelope, &key, &with_outputs).succeeds().json();
    assert_eq!(statement["subject"][0]["name"], "build/out");
    let predicate = &statement["predicate"];
    let dependencies = predicate["buildDefinition"]["resolvedDependencies"].as_array().unwrap();
    let names: Vec<_> = dependencies.iter().map(|dependency| dependency["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"in") && names.contains(&"image/kernel"), "{names:?}");
    assert_eq!(predicate["runDetails"]["metadata"]["invocationId"], succeeded.as_str());
    let parameters = &predicate["buildDefinition"]["externalParameters"];
    assert_eq!((&parameters["interactive"], &parameters["secrets"]), (&Value::Bool(false), &Value::Array(Vec::new())));
    assert_eq!(parameters["tenant"], format!("user:{}", nix::unistd::geteuid()));

    // A statement of something else, another key, another output.
    verify("{}", &key, &[]).exits_with(1).says("no DSSE envelope");
    let at = envelope.find("\"payload\":\"").unwrap() + 30;
    let letter = if &envelope[at..=at] == "A" { "B" } else { "A" };
    let changed = [&envelope[..at], letter, &envelope[at + 1..]].concat();
    verify(&changed, &key, &[]).exits_with(1).says("no valid signature of the key");
    let state = cofferdam.files().join("../state");
    fs::remove_file(state.join("provenance.key")).unwrap();
    let daemon = Daemon::start(&cofferdam, "");
    let other =
        cofferdam.command(["builds", "--daemon", &daemon.addr(), "provenance", "--public-key"]).succeeds().stdout;
    daemon.end().succeeds();
    verify(&envelope, &cofferdam.file("other.pem", other), &[]).exits_with(1).says("no valid signature of the key");
    let copy = output.join("copy");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    verify(&envelope, &key, &with_outputs).exits_with(1).says("the statement says dir:blake3-");
    verify(&envelope, &key, &[]).succeeds();
    verify(&envelope, &cofferdam.file("none.pem", "nothing"), &[]).exits_with(2).says("no Ed25519 public key in PEM");
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let cofferdam = Cofferdam::new();
    let key = cofferdam.file("signing.key", "nothing");
    let file = cofferdam.file("daemon.toml", format!("allow_emulation = true\n[provenance]\nkey = {key:?}"));
    let check = || cofferdam.command(["daemon", "--check-config", "--config", file.to_str().unwrap()]);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    check().exits_with(2).says("daemon.toml:3: provenance.key").says("mode 644").says("chmod 600");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    check().exits_with(2).says("it holds no Ed25519 private key in PEM");
}
