//! Wrong requests are refused with exit code 2, naming field, rule and value, before a VM starts.

use std::{fs, io, os::unix::fs::PermissionsExt, path::PathBuf};

use cofferdam_tests::{Cofferdam, vmm};
use serde_json::{Value, json};

/// A valid request. Only its command does not exist.
fn request() -> Value {
    json!({
        "commandArgs": ["/nothing"],
        "workingDir": "build",
        "scratchPaths": ["build"],
        "inputsDir": "inputs",
        "constraints": { "system": "x86_64-linux" },
    })
}

/// A VMM that can say its version, and is refused when it is to run a machine.
fn vmm_that_cannot_be_started(cofferdam: &Cofferdam) -> io::Result<PathBuf> {
    let script = format!("#!/bin/sh\nexec '{}' \"$@\"\n# {}\n", vmm::choice().program.display(), "-".repeat(64));
    let path = cofferdam.file("vmm", script);
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
    Ok(path)
}

/// Why it is refused.
const NOT_STARTED: &str = "it is a script";

/// Replaces a field by each value of `wrong`. The error must start with the name of the wrong field and contain the words.
fn all_are_refused(reason: &str, wrong: Vec<(&str, Value, &str, &str)>) {
    let cofferdam = Cofferdam::new();
    let vmm = vmm_that_cannot_be_started(&cofferdam).expect("the test's directory can be written");
    for (field, value, named, words) in wrong {
        let mut request = request();
        request[field] = value;
        let build = cofferdam.build().without_slot().host_variable(vmm::setting(), &vmm);
        let refused = build.request(&request).is_refused(reason).says(named).says(words);
        assert!(!refused.stderr.contains(NOT_STARTED), "a VM was to be started: {refused}");
        assert_eq!(refused.json()["fields"]["field"], named, "{request}: {refused}");
    }
    // A request with nothing wrong gets as far as that.
    let build = cofferdam.build().without_slot().host_variable(vmm::setting(), &vmm);
    build.request(&request()).exits_with(3).says(NOT_STARTED);
}

#[test]
fn unclean_and_repeated_paths_are_refused_in_every_field() {
    let (relative, dotted, slash) = ("must be relative", "must not hold \".\" or \"..\"", "superfluous slash");
    let duplicate = "must not be a duplicate";
    let mut wrong = Vec::new();
    for field in ["workingDir", "inputsDir"] {
        let name = if field == "workingDir" { "working_dir" } else { "inputs_dir" };
        for (path, words) in [("/build", relative), ("a/../b", dotted), ("./a", dotted), ("a//b", slash), ("a/", slash)]
        {
            wrong.push((field, json!(path), name, words));
        }
    }
    let lists = [
        ("scratchPaths", ["scratch_paths[0]", "scratch_paths[1]"]),
        ("outputs", ["outputs[0]", "outputs[1]"]),
        ("additionalFiles", ["additional_files[0].path", "additional_files[1].path"]),
    ];
    for (field, [first, second]) in lists {
        let list = |paths: &[&str]| match field {
            "additionalFiles" => paths.iter().map(|path| json!({ "path": path, "contents": "eA==" })).collect(),
            _ => json!(paths),
        };
        wrong.push((field, list(&["/absolute"]), first, relative));
        wrong.push((field, list(&["a/./b"]), first, dotted));
        wrong.push((field, list(&["a", "b/.."]), second, dotted));
        wrong.push((field, list(&["a//b"]), first, slash));
        wrong.push((field, list(&["a", "a"]), second, duplicate));
    }
    wrong.push(("outputs", json!([""]), "outputs[0]", "must not be empty"));
    all_are_refused("invalid", wrong);
}

#[test]
fn rules_of_commands_and_environments_are_enforced() {
    let variable = |key: &str| json!({ "key": key, "value": "eA==" });
    all_are_refused(
        "invalid",
        vec![
            ("commandArgs", json!([]), "command_args", "must not be empty"),
            ("commandArgs", json!([""]), "command_args[0]", "must not be empty"),
            ("commandArgs", json!(["a", "b\0c"]), "command_args[1]", "NUL"),
            ("environmentVars", json!([variable("")]), "environment_vars[0].key", "must not be empty"),
            ("environmentVars", json!([variable("A=B")]), "environment_vars[0].key", "\"=\""),
            ("environmentVars", json!([variable("A\0B")]), "environment_vars[0].key", "NUL"),
            ("environmentVars", json!([{ "key": "A", "value": "AA==" }]), "environment_vars[0].value", "NUL"),
            ("environmentVars", json!([variable("A"), variable("A")]), "environment_vars[1].key", "duplicate"),
            ("refscanNeedles", json!(["a", ""]), "refscan_needles[1]", "must not be empty"),
        ],
    );
}

#[test]
fn inputs_are_held_to_their_rules() {
    let base64 = |bytes: &[u8]| data_encoding::BASE64.encode(bytes);
    let link = |name: &str| json!({ "symlink": { "name": base64(name.as_bytes()), "target": base64(b"t") } });
    let file =
        |name: &str, digest: &[u8]| json!({ "file": { "name": base64(name.as_bytes()), "digest": base64(digest) } });
    all_are_refused(
        "invalid",
        vec![
            ("inputs", json!([link("a"), link("a")]), "inputs[1].symlink.name", "duplicate"),
            ("inputs", json!([link("")]), "inputs[0].symlink.name", "empty"),
            ("inputs", json!([link("..")]), "inputs[0].symlink.name", ".."),
            ("inputs", json!([link("a/b")]), "inputs[0].symlink.name", "slash"),
            ("inputs", json!([file("a", b"short")]), "inputs[0].file.digest", "32 bytes"),
            ("inputs", json!([{}]), "inputs[0]", "must be"),
        ],
    );
}

#[test]
fn missing_inputs_are_named_before_a_machine_boots() {
    let base64 = |bytes: &[u8]| data_encoding::BASE64.encode(bytes);
    let digest = base64(&[7; 32]);
    let input = |kind: &str| {
        let mut node = json!({});
        node[kind] = json!({ "name": base64(b"a"), "digest": digest, "size": "9" });
        json!([node])
    };
    all_are_refused(
        "missing",
        vec![("inputs", input("file"), "inputs[0]", &digest), ("inputs", input("directory"), "inputs[0]", &digest)],
    );
}

#[test]
fn unsupported_constraints_are_refused() {
    all_are_refused(
        "unsupported",
        vec![
            ("constraints", json!({ "system": "aarch64-linux" }), "constraints.system", "x86_64-linux"),
            (
                "constraints",
                json!({ "system": "x86_64-linux", "minMemory": (1_u64 << 50).to_string() }),
                "constraints.min_memory",
                "must not exceed the host's memory",
            ),
            (
                "constraints",
                json!({ "system": "x86_64-linux", "availableRoPaths": ["/dev/kvm"] }),
                "constraints.available_ro_paths",
                "builds of this host run no VMs of their own",
            ),
            (
                "constraints",
                json!({ "system": "x86_64-linux", "availableRoPaths": ["/etc/hosts"] }),
                "constraints.available_ro_paths",
                "must have only those that the host's configuration allows",
            ),
            (
                "constraints",
                json!({ "system": "x86_64-linux", "networkAccess": true }),
                "constraints.network_access",
                "builds of this host have no network",
            ),
        ],
    );
    all_are_refused(
        "invalid",
        vec![
            ("constraints", json!({ "system": "" }), "constraints.system", "must not be empty"),
            (
                "constraints",
                json!({ "system": "x86_64-linux", "availableRoPaths": ["relative"] }),
                "constraints.available_ro_paths[0]",
                "must be absolute",
            ),
        ],
    );
}

#[test]
fn malformed_requests_are_refused() {
    let cofferdam = Cofferdam::new();
    for (text, words) in [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "must be"),
        ("not JSON", "expected"),
        (r#"{"commandArgs": ["a"], "colour": "red"}"#, "colour"),
        (r#"{"commandArgs": "a"}"#, "must be"),
        (r#"{"commandArgs": ["a"]} {}"#, "trailing"),
        (r#"{"environmentVars": [{"key": "A", "value": "no base64!"}]}"#, "must be"),
    ] {
        let refused = cofferdam.build().without_slot().request_text(text).is_refused("malformed");
        refused.says("BuildRequest").says(words);
    }
    let binary = cofferdam.file("request.binpb", b"\xff\xff\xff");
    let refused = cofferdam.command(["build".as_ref(), binary.as_os_str(), "--json".as_ref()]);
    refused.is_refused("malformed").says("binary");
    let missing = cofferdam.command(["build", "nowhere.json", "--json"]);
    missing.is_refused("command_line").says("nowhere.json").says("No such file");
}

#[test]
fn flags_are_held_to_the_same_rules() {
    let cofferdam = Cofferdam::new();
    let build = || cofferdam.build().without_slot();
    build().output("build/../..").run(["a"]).is_refused("invalid").says("outputs[0]");
    build().flag("--env", "=x").run(["a"]).is_refused("invalid").says("environment_vars[0].key");
    build().flag("--scratch", "a/..").run(["a"]).is_refused("invalid").says("scratch_paths");
    let file = cofferdam.file("file", "x");
    build().input("twice", &file).input("twice", &file).run(["a"]).is_refused("invalid").says("duplicate");
    build().input("gone", &cofferdam.files().join("gone")).run(["a"]).is_refused("command_line").says("gone");
    build().flag("--env", "novalue").run(["a"]).is_refused("command_line").says("--env K=V");
}

#[test]
fn an_incomplete_image_is_reported_with_a_fix() {
    let cofferdam = Cofferdam::with_image("/nowhere/image");
    let failed = cofferdam.build().without_slot().run(["a"]).executor_fails("host");
    failed.says("/nowhere/image/kernel").says("just image");

    let (complete, _) = cofferdam_tests::image();
    let partial = tempfile::tempdir().unwrap();
    fs::copy(complete.join("kernel"), partial.path().join("kernel")).unwrap();
    let cofferdam = Cofferdam::with_image(partial.path());
    let failed = cofferdam.build().without_slot().run(["a"]).executor_fails("host");
    failed.says("initramfs").says("just image");
}

#[test]
fn memory_and_cpus_beyond_the_host_are_refused_at_once() {
    let cofferdam = Cofferdam::new();
    let build = || cofferdam.build().without_slot();
    build().flag("--cpus", "254").shell("true").exits_with(2).says("--cpus 254 is more than this host has");
    build().memory("1000T").shell("true").exits_with(2).says("is more than this host has");
}
