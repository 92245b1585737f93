use cofferdam_castore::proto::{DirectoryEntry, Entry, FileEntry, SymlinkEntry, entry};
use cofferdam_protocol::{FromHost, Secret, Specification, frame::FrameWriter};
use proptest::prelude::*;
use prost::Message as _;
use proto::{
    BuildRequest as Message,
    build_request::{AdditionalFile as WireFile, BuildConstraints as WireConstraints, EnvVar as WireVar},
};

mod encodings;
mod fields;

use super::{path::unclean, *};

fn file(name: &[u8]) -> Entry {
    let entry = FileEntry {
        name: Bytes::copy_from_slice(name),
        digest: Bytes::from_static(&[2; 32]),
        size: 3,
        executable: true,
    };
    Entry { entry: Some(entry::Entry::File(entry)) }
}

fn directory(name: &[u8]) -> Entry {
    let (name, digest) = (Bytes::copy_from_slice(name), Bytes::from_static(&[1; 32]));
    Entry { entry: Some(entry::Entry::Directory(DirectoryEntry { name, digest, size: u64::MAX })) }
}

fn symlink(name: &[u8], target: &[u8]) -> Entry {
    let (name, target) = (Bytes::copy_from_slice(name), Bytes::copy_from_slice(target));
    Entry { entry: Some(entry::Entry::Symlink(SymlinkEntry { name, target })) }
}

fn var(key: &str, value: &[u8]) -> WireVar {
    WireVar { key: key.into(), value: Bytes::copy_from_slice(value) }
}

fn additional(path: &str) -> WireFile {
    WireFile { path: path.into(), contents: Bytes::from_static(b"contents\xff") }
}

fn strings(items: &[&str]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

/// A request with something in every field.
fn full() -> Message {
    Message {
        inputs: vec![directory(b"gcc"), symlink(b"latest", b"gcc/../gcc"), file(b"m\xff.c")],
        command_args: strings(&["gcc/bin/gcc", "-o", "out", ""]),
        working_dir: "build".into(),
        scratch_paths: strings(&["build", "nix/store"]),
        inputs_dir: "nix/store".into(),
        outputs: strings(&["build/out", "build/out/doc", "nix/store/x"]),
        environment_vars: vec![var("EMPTY", b""), var("HOME", b"/homeless-shelter"), var("X", b"=\xfe")],
        constraints: Some(WireConstraints {
            system: SYSTEM.into(),
            min_memory: 1 << 60,
            available_ro_paths: strings(&["/dev/kvm", "/etc"]),
            network_access: true,
            provide_bin_sh: true,
        }),
        additional_files: vec![additional("build/.attrs.json"), additional("nix/store/beside")],
        refscan_needles: strings(&["zzz", "aaa", "aaa"]),
    }
}

fn refused(message: Message) -> String {
    let error = BuildRequest::try_from(message).unwrap_err();
    assert_eq!(error.kind, RequestErrorKind::Invalid, "{error}");
    error.to_string()
}

type Change<'a> = &'a dyn Fn(&mut Message);

/// Changes the full request and expects this error.
fn check(cases: &[(Change<'_>, &str)]) {
    for (change, expected) in cases {
        let mut message = full();
        change(&mut message);
        assert_eq!(refused(message), *expected);
    }
}

/// Puts every unclean path into a field, and expects the error to name field and rule.
fn check_unclean(field: &str, put: impl Fn(&mut Message, String)) {
    for (rule, path) in unclean().into_iter().chain([("leading slash", "/a".into())]) {
        let mut message = full();
        put(&mut message, path);
        let error = refused(message);
        assert!(error.starts_with(&format!("{field} must ")) && error.contains(rule), "{error}");
    }
}

#[test]
fn a_full_request_is_taken_and_says_the_same_again() {
    let request = BuildRequest::try_from(full()).unwrap();
    assert_eq!(request.to_proto(), full());
}

#[test]
fn the_smallest_request_is_a_command() {
    let message = Message { command_args: strings(&["true"]), ..Message::default() };
    let request = BuildRequest::try_from(message.clone()).unwrap();
    assert_eq!(request.to_proto(), message);
    assert!(request.working_dir.is_root() && request.inputs_dir.is_root());
}

#[test]
fn any_order_of_a_list_is_one_request() {
    let sorted = BuildRequest::try_from(full()).unwrap();
    let mut message = full();
    message.inputs.reverse();
    message.scratch_paths.reverse();
    message.environment_vars.reverse();
    message.additional_files.reverse();
    message.constraints.as_mut().unwrap().available_ro_paths.reverse();
    assert_ne!(message, full());
    assert_eq!(BuildRequest::try_from(message).unwrap(), sorted);
}

#[test]
fn the_order_of_outputs_is_kept_and_not_in_the_digest() {
    let request = |outputs: &[&str]| BuildRequest::try_from(Message { outputs: strings(outputs), ..full() }).unwrap();
    let [one, other] = [request(&["b", "a", "c"]), request(&["a", "b", "c"])];
    assert_eq!(one.digest(), other.digest());
    assert_eq!(one.to_proto().outputs, ["b", "a", "c"]);
    let outputs = one.output_order().arrange(&other.outputs, &other.output_order()).unwrap();
    assert_eq!(outputs, one.outputs);
}
