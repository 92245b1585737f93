use std::error::Error as _;

use clap::Parser;
use cofferdam_castore::B3Digest;

use super::*;
use crate::cli::{Cli, Command};

fn parse(arguments: &[&str]) -> RunArgs {
    let cli = Cli::try_parse_from(["cofferdam", "run"].iter().chain(arguments)).unwrap();
    match cli.command {
        Command::Run(args) => *args,
        _ => unreachable!(),
    }
}

fn strings(items: &[&str]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

#[test]
fn a_command_alone_gets_the_defaults() {
    let message = parse(&["--", "/bin/true"]).message().unwrap();
    let constraints = BuildConstraints { system: "x86_64-linux".into(), ..BuildConstraints::default() };
    let expected = proto::BuildRequest {
        command_args: strings(&["/bin/true"]),
        working_dir: "build".into(),
        scratch_paths: strings(&["build"]),
        inputs_dir: "inputs".into(),
        constraints: Some(constraints),
        ..proto::BuildRequest::default()
    };
    assert_eq!(message, expected);
    BuildRequest::try_from(message).unwrap();
}

#[test]
fn every_flag_sets_its_field_and_lists_are_sorted() {
    let args = parse(&[
        "--inputs-dir",
        "",
        "--workdir",
        "w",
        "--scratch",
        "w",
        "--scratch",
        "a",
        "--scratch",
        "w",
        "--output",
        "/z",
        "--output",
        "./w//o/",
        "--output",
        "z",
        "--needle",
        "z",
        "--needle",
        "a",
        "--bin-sh",
        "--network",
        "--memory",
        "512M",
        "--env",
        "B=first",
        "--env",
        "A==",
        "--env",
        "B=last",
        "--",
        "a",
        "--output",
        "--",
    ]);
    let message = args.message().unwrap();
    let var = |key: &str, value: &'static str| EnvVar { key: key.into(), value: value.into() };
    let expected = proto::BuildRequest {
        inputs: vec![],
        command_args: strings(&["a", "--output", "--"]),
        working_dir: "w".into(),
        scratch_paths: strings(&["a", "build", "w"]),
        inputs_dir: String::new(),
        outputs: strings(&["w/o", "z"]),
        environment_vars: vec![var("A", "="), var("B", "last")],
        constraints: Some(BuildConstraints {
            system: "x86_64-linux".into(),
            min_memory: 512 << 20,
            available_ro_paths: vec![],
            network_access: true,
            provide_bin_sh: true,
        }),
        additional_files: vec![],
        refscan_needles: strings(&["z", "a"]),
    };
    assert_eq!(message, expected);
    BuildRequest::try_from(message).unwrap();
}

#[test]
fn inputs_come_from_paths_nodes_and_digests() {
    let digest = B3Digest::of(b"");
    let from = |text: String| source(&text.into()).unwrap();
    let name = || PathComponent::try_from("n").unwrap();
    assert_eq!(from("n=a=b".into()), (name(), Source::Path("a=b".into())));
    assert_eq!(from("n=./dir:x".into()), (name(), Source::Path("./dir:x".into())));
    assert_eq!(from(format!("n={digest}")), (name(), Source::Store(Reference::Digest(digest))));
    let node = Node::File { digest, size: 0, executable: true };
    assert_eq!(from(format!("n=file:{digest}:0:x")), (name(), Source::Store(Reference::Node(node))));
    let path = OsString::from_vec(b"n=\xff".to_vec());
    assert_eq!(source(&path).unwrap().1, Source::Path(OsString::from_vec(b"\xff".to_vec()).into()));
}

#[test]
fn wrong_arguments_are_quoted_with_the_rule() {
    for (argument, rule) in [
        ("path", "no \"=\""),
        ("=path", "is empty"),
        ("a/b=path", "slash"),
        ("n=", "nothing after"),
        ("n=dir:x", "write dir:"),
        ("n=blake3-x", "base64"),
    ] {
        let error = source(&argument.into()).unwrap_err();
        assert_eq!(error.exit().code(), 2);
        assert!(error.to_string().contains(rule) && error.to_string().contains(argument), "{error}");
    }
    assert!(variable(&"KEY".into()).unwrap_err().to_string().contains("no \"=\""));
    let error = parse(&["--input", "n=a", "--input", "n=b", "--", "a"]).sources().unwrap_err();
    assert_eq!(error.exit().code(), 2);
    let source = error.source().unwrap().to_string();
    assert_eq!(source, "inputs must not have a duplicate name (got \"n=b\")");
}

#[test]
fn a_root_brings_a_path_unless_one_is_given() {
    let path = |arguments: &[&str]| {
        let variables = parse(arguments).message().unwrap().environment_vars;
        variables.into_iter().map(|variable| (variable.key, variable.value)).collect::<Vec<_>>()
    };
    let expected = |value: &'static str| [("PATH".to_owned(), Bytes::from_static(value.as_bytes()))];
    assert_eq!(path(&["--root", "r", "--", "a"]), expected(ROOT_PATH));
    assert_eq!(path(&["--root", "r", "--env", "PATH=/x", "--", "a"]), expected("/x"));
    assert_eq!(path(&["--source", ".", "--", "a"]), []);
}

#[test]
fn an_option_after_the_dashes_is_found_unless_it_was_given_before() {
    for (arguments, found) in [
        (&["--output", "build/x", "--", "make", "--out", "result"][..], Some("--out")),
        (&["--", "make", "--output=x"], Some("--output")),
        (&["--out", "result", "--output", "build/x", "--", "make", "--out", "x", "--output"], None),
        (&["--", "make", "--out-dir", "-o", "--outer"], None),
        (&["--", "--out"], None),
    ] {
        assert_eq!(parse(arguments).misplaced(), found, "{arguments:?}");
    }
}

#[test]
fn excessive_requests_are_refused_before_anything_is_opened() {
    let one_more = std::thread::available_parallelism().unwrap().get() + 1;
    for (flag, value) in [("--memory", "1000T"), ("--cpus", &one_more.to_string())] {
        let args = parse(&[flag, value, "--", "a"]);
        let request = BuildRequest::try_from(args.message().unwrap()).unwrap();
        let error = args.execute.prepare(&ClientArgs::default(), request).err().unwrap();
        assert_eq!(error.exit().code(), 2);
        assert!(error.to_string().starts_with(flag), "{error}");
    }
}

#[test]
fn clap_refuses_what_it_can_judge() {
    for arguments in [
        &["--cpus", "0", "--", "a"][..],
        &["--memory", "lots", "--", "a"],
        &["--memory", "1M", "--", "a"],
        &["--scratch-size", "2T", "--", "a"],
        &["--timeout", "10", "--", "a"],
        &["--vmm", "firecracker", "--", "a"],
        &["a"],
        &[],
    ] {
        let error = Cli::try_parse_from(["cofferdam", "run"].iter().chain(arguments)).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{arguments:?}");
    }
}
