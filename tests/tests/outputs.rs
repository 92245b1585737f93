//! The outputs of a build: every kind, in order, as text and as JSON.

use std::{fs, os::unix::fs::PermissionsExt};

use cofferdam_tests::{
    Cofferdam,
    castore::{self, NodeText},
};
use serde_json::json;

#[test]
fn an_output_is_exported_by_node_and_by_digest() {
    let cofferdam = Cofferdam::new();
    let built = cofferdam.build().output("build/out").plain().shell("echo hello > out").succeeds();

    let hello = NodeText::file(b"hello\n", false);
    assert_eq!(built.stdout, format!("build/out\t{hello}\n"));
    for printed in [hello.as_str(), hello.digest().unwrap()] {
        assert_eq!(fs::read_to_string(cofferdam.export(printed)).unwrap(), "hello\n");
    }
    let printed = cofferdam.command(["export", hello.as_str(), "-"]).succeeds();
    assert_eq!(printed.stdout, "hello\n");
}

#[test]
fn outputs_of_every_kind_have_the_requests_order() {
    let cofferdam = Cofferdam::new();
    let built = cofferdam
        .build()
        .output("build/a-link")
        .output("build/b-file")
        .output("build/c-directory")
        .output("build/d-executable")
        .output("build/e-empty")
        .exported()
        .shell(
            "ln -s ../anywhere a-link
             printf content > b-file
             mkdir -p c-directory/deep/deeper c-directory/empty
             printf x > c-directory/deep/deeper/$(printf 'not\\377utf8')
             ln -s deep c-directory/link
             printf '#!/bin/sh\\n' > c-directory/run && chmod 700 c-directory/run
             printf 'program' > d-executable && chmod 0755 d-executable
             : > e-empty && chmod 0066 e-empty",
        )
        .succeeds();

    let nodes: Vec<_> = built.outputs().into_iter().map(|output| output.node).collect();
    let expected = [
        NodeText::symlink("../anywhere"),
        NodeText::file(b"content", false),
        castore::node_of(&built.exported("build/c-directory")),
        NodeText::file(b"program", true),
        NodeText::file(b"", false),
    ];
    assert_eq!(nodes, expected, "{built}");

    let directory = built.exported("build/c-directory");
    assert_eq!(fs::read_dir(directory.join("deep/deeper")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(directory.join("empty")).unwrap().count(), 0);
    assert_eq!(fs::read_link(directory.join("link")).unwrap().to_str(), Some("deep"));
    let is_executable = |path| fs::metadata(path).unwrap().permissions().mode() & 0o100 != 0;
    assert!(is_executable(directory.join("run")) && is_executable(built.exported("build/d-executable")));
    assert!(!is_executable(built.exported("build/b-file")));
    assert_eq!(fs::read_link(built.exported("build/a-link")).unwrap().to_str(), Some("../anywhere"));
}

#[test]
fn equal_requests_give_equal_json_responses() {
    let cofferdam = Cofferdam::new();
    let response = || {
        let build = cofferdam.build().output("build/one").output("build/two").flag("--needle", "absent");
        let build = build.flag("--needle", "present");
        build.shell("echo is present > one; ln -s target two").succeeds().json()
    };
    let first = response();
    let base64 = |bytes: &[u8]| data_encoding::BASE64.encode(bytes);
    let digest = base64(blake3::hash(b"is present\n").as_bytes());
    let expected = json!({ "outputs": [
        { "output": { "file": { "digest": digest, "size": "11" } }, "needles": ["1"] },
        { "output": { "symlink": { "target": base64(b"target") } } },
    ]});
    assert_eq!(first, expected);
    assert_eq!(response(), first);
}

#[test]
fn an_output_may_lie_within_another() {
    let cofferdam = Cofferdam::new();
    let script = "mkdir -p all/part; echo 1 > all/part/file";
    let built = cofferdam.build().output("build/all").output("build/all/part").exported().shell(script).succeeds();
    let [all, part] = &built.outputs()[..] else { panic!("{built}") };
    assert_eq!(all.node, castore::node_of(&built.exported("build/all")));
    assert_eq!(part.node, castore::node_of(&built.exported("build/all/part")));
}

#[test]
fn a_result_is_printed_even_if_its_export_fails() {
    let cofferdam = Cofferdam::new();
    // A name in /proc looks free, but can't be created.
    let build = cofferdam.build().output("build/out").flag("--out", "/proc/cofferdam");
    let built = build.shell("echo hello > out").exits_with(2);
    let node = built.output().node;
    assert_eq!(node, NodeText::file(b"hello\n", false));
    let built = built.says("output \"build/out\" can't be written to \"/proc/cofferdam/build/out\"");
    built.says(&format!("try: cofferdam export {node} /proc/cofferdam/build/out"));
    assert_eq!(fs::read_to_string(cofferdam.export(node.as_str())).unwrap(), "hello\n");
}

/// A request like snix's for a Nix derivation.
#[test]
fn a_nix_build_writes_its_output_beside_its_inputs() {
    let cofferdam = Cofferdam::new();
    let [dependency, output, stranger] =
        ["0c5b8vw40dy178xlpddw65q9gf1h2186", "1b9p07z77phvv2hf6gm9f28syp39f1ag", "2rwxkwsqp3hyrjlnhq8xdrmvdx4xgb3m"];
    fs::create_dir(cofferdam.files().join("dep")).unwrap();
    cofferdam.file("dep/greeting", "hello from the store");
    let input = cofferdam.import(&cofferdam.files().join("dep"));
    let name = |hash: &str, name: &str| format!("{hash}-{name}");
    let base64 = |text: String| data_encoding::BASE64.encode(text.as_bytes());
    let (_, rest) = input.as_str().split_once("blake3-").unwrap();
    let (digest, size) = rest.split_once(':').unwrap();
    let out = format!("nix/store/{}", name(output, "result"));
    let script = format!(
        "test \"$(cat .attrs.sh)\" = declare && test $PWD = /build || exit 9
         cat /nix/store/{dependency}-dep/greeting > $out
         echo \" and /nix/store/{dependency}-dep, in $out\" >> $out
         ! echo overwritten > /nix/store/{dependency}-dep/greeting || cat /nix/store/{dependency}-dep/greeting"
    );
    let request = json!({
        "inputs": [{ "directory": { "name": base64(name(dependency, "dep")), "digest": digest, "size": size } }],
        "commandArgs": ["/bin/sh", "-c", script],
        "workingDir": "build",
        "scratchPaths": ["build", "nix/store"],
        "inputsDir": "nix/store",
        "outputs": [out],
        "environmentVars": [
            { "key": "HOME", "value": base64("/homeless-shelter".into()) },
            { "key": "PATH", "value": base64("/path-not-set".into()) },
            { "key": "out", "value": base64(format!("/{out}")) },
        ],
        "constraints": { "system": "x86_64-linux", "provideBinSh": true },
        "additionalFiles": [{ "path": "build/.attrs.sh", "contents": base64("declare".into()) }],
        "refscanNeedles": [dependency, output, stranger],
    });
    let built = cofferdam.build().exported().request(&request).succeeds();
    let expected = format!("hello from the store and /nix/store/{dependency}-dep, in /{out}\n");
    assert_eq!(built.read(&out), expected);
    assert_eq!(built.output().needles, [0, 1], "{built}");
    let kept = cofferdam.export(input.as_str());
    assert_eq!(fs::read_to_string(kept.join("greeting")).unwrap(), "hello from the store");
}
