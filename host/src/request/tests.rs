use cofferdam_castore::proto::{DirectoryEntry, Entry, FileEntry, SymlinkEntry, entry};
use cofferdam_protocol::{FromHost, Specification, frame::FrameWriter};
use proptest::prelude::*;
use prost::Message as _;
use proto::{
    BuildRequest as Message,
    build_request::{AdditionalFile as WireFile, BuildConstraints as WireConstraints, EnvVar as WireVar},
};

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
fn inputs_are_checked() {
    let digest = |message: &mut Message, length: usize| {
        message.inputs[0] = directory(b"gcc");
        let Some(entry::Entry::Directory(entry)) = &mut message.inputs[0].entry else { unreachable!() };
        entry.digest = vec![0; length].into();
    };
    check(&[
        (&|m| m.inputs[1] = Entry { entry: None }, "inputs[1] must be a directory, a file or a symlink"),
        (&|m| m.inputs[2] = file(b""), "inputs[2].file.name is empty (got \"\")"),
        (&|m| m.inputs[2] = file(b".."), "inputs[2].file.name is reserved (got \"..\")"),
        (&|m| m.inputs[2] = file(b"n/\xff"), "inputs[2].file.name holds a slash (got \"n/\\xff\")"),
        (&|m| m.inputs[0] = directory(b"a\0"), "inputs[0].directory.name holds a NUL (got \"a\\x00\")"),
        (&|m| m.inputs[1] = symlink(b"latest", b""), "inputs[1].symlink.target is empty (got \"\")"),
        (&|m| digest(m, 0), "inputs[0].directory.digest must be 32 bytes of BLAKE3 (got 0 bytes)"),
        (&|m| digest(m, 31), "inputs[0].directory.digest must be 32 bytes of BLAKE3 (got 31 bytes)"),
        (&|m| digest(m, 33), "inputs[0].directory.digest must be 32 bytes of BLAKE3 (got 33 bytes)"),
        (
            &|m| m.inputs[1] = file(b"gcc"),
            "inputs[1].file.name must not be a duplicate of inputs[0].directory.name (got \"gcc\")",
        ),
        (&|m| m.inputs = vec![file(b"a"); MAX_INPUTS + 1], "inputs must not have more than 65536 entries (got 65537)"),
    ]);
}

#[test]
fn command_args_are_checked() {
    check(&[
        (&|m| m.command_args.clear(), "command_args must not be empty: name the command to run"),
        (&|m| m.command_args[0].clear(), "command_args[0] must not be empty: it is the command to run"),
        (&|m| m.command_args[2] = "a\0b".into(), "command_args[2] must not hold a NUL (got \"a\\0b\")"),
        (
            &|m| m.command_args[1] = "a".repeat(MAX_ARG_BYTES + 1),
            "command_args[1] must not be longer than 131071 bytes (got 131072 bytes)",
        ),
        (
            &|m| m.command_args = vec!["a".into(); MAX_ARGS + 1],
            "command_args must not have more than 65536 entries (got 65537)",
        ),
    ]);
}

#[test]
fn working_dir_is_checked() {
    check_unclean("working_dir", |message, path| message.working_dir = path);
}

#[test]
fn inputs_dir_is_checked() {
    check_unclean("inputs_dir", |message, path| message.inputs_dir = path);
}

#[test]
fn scratch_paths_are_checked() {
    check_unclean("scratch_paths[1]", |message, path| message.scratch_paths[1] = path);
    check(&[
        (
            &|m| m.scratch_paths = strings(&["a", "b", "b"]),
            "scratch_paths[2] must not be a duplicate of scratch_paths[1] (got \"b\")",
        ),
        (
            &|m| m.scratch_paths = strings(&vec!["a"; MAX_SCRATCH_PATHS + 1]),
            "scratch_paths must not have more than 1024 entries (got 1025)",
        ),
    ]);
}

#[test]
fn outputs_are_checked() {
    check_unclean("outputs[0]", |message, path| message.outputs[0] = path);
    check(&[
        (&|m| m.outputs = strings(&[""]), "outputs[0] must not be empty: name what the build makes below its root"),
        (&|m| m.outputs = strings(&["a", "a"]), "outputs[1] must not be a duplicate of outputs[0] (got \"a\")"),
        (
            &|m| m.outputs = strings(&vec!["a"; MAX_OUTPUTS + 1]),
            "outputs must not have more than 4096 entries (got 4097)",
        ),
    ]);
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
fn outputs_stay_in_the_order_of_the_request_and_no_order_changes_its_digest() {
    let request = |outputs: &[&str]| BuildRequest::try_from(Message { outputs: strings(outputs), ..full() }).unwrap();
    let [one, other] = [request(&["b", "a", "c"]), request(&["a", "b", "c"])];
    assert_eq!(one.digest(), other.digest());
    assert_eq!(one.to_proto().outputs, ["b", "a", "c"]);
    let outputs = one.output_order().arrange(&other.outputs, &other.output_order()).unwrap();
    assert_eq!(outputs, one.outputs);
}

#[test]
fn environment_vars_are_checked() {
    check(&[
        (&|m| m.environment_vars[0].key.clear(), "environment_vars[0].key must not be empty"),
        (&|m| m.environment_vars[1] = var("A=B", b""), "environment_vars[1].key must not hold a \"=\" (got \"A=B\")"),
        (&|m| m.environment_vars[1] = var("A\0", b""), "environment_vars[1].key must not hold a NUL (got \"A\\0\")"),
        (
            &|m| m.environment_vars[2] = var("X", b"\xff\0"),
            "environment_vars[2].value must not hold a NUL (got \"\\xff\\x00\")",
        ),
        (
            &|m| m.environment_vars[2] = var("X", &[b'v'; MAX_ARG_BYTES - 1]),
            "environment_vars[2].value must not be longer than 131071 bytes with key and \"=\" (got 131072 bytes)",
        ),
        (
            &|m| m.environment_vars[2].key = "HOME".into(),
            "environment_vars[2].key must not be a duplicate of environment_vars[1].key (got \"HOME\")",
        ),
        (
            &|m| m.environment_vars = vec![var("A", b""); MAX_ENVIRONMENT_VARS + 1],
            "environment_vars must not have more than 65536 entries (got 65537)",
        ),
    ]);
}

#[test]
fn constraints_are_checked() {
    fn constraints(message: &mut Message) -> &mut WireConstraints {
        message.constraints.as_mut().unwrap()
    }
    let field = "constraints.available_ro_paths";
    for (rule, path) in unclean() {
        let mut message = full();
        constraints(&mut message).available_ro_paths[1] = format!("/{path}");
        let error = refused(message);
        assert!(error.starts_with(&format!("{field}[1] must ")) && error.contains(rule), "{error}");
    }
    check(&[
        (&|m| constraints(m).system.clear(), "constraints.system must not be empty: name it, or leave out constraints"),
        (
            &|m| constraints(m).available_ro_paths[0] = "dev".into(),
            "constraints.available_ro_paths[0] must be absolute (got \"dev\")",
        ),
        (
            &|m| constraints(m).available_ro_paths[1] = "/dev/kvm".into(),
            "constraints.available_ro_paths[1] must not be a duplicate of constraints.available_ro_paths[0] \
             (got \"/dev/kvm\")",
        ),
        (
            &|m| constraints(m).available_ro_paths = strings(&vec!["/a"; MAX_RO_PATHS + 1]),
            "constraints.available_ro_paths must not have more than 1024 entries (got 1025)",
        ),
    ]);
}

#[test]
fn additional_files_are_checked() {
    let field = "additional_files[0].path";
    check_unclean(field, |message, path| message.additional_files[0].path = path);
    let place = |path: &'static str| move |message: &mut Message| message.additional_files = vec![additional(path)];
    let within = "additional_files[0].path must not be or lie within an input: inputs are content-addressed and never \
                  change";
    check(&[
        (&place(""), "additional_files[0].path must not be empty: it would be the build's root (got \"\")"),
        (&place("nix"), "additional_files[0].path must not be inputs_dir or above it (got \"nix\")"),
        (&place("nix/store"), "additional_files[0].path must not be inputs_dir or above it (got \"nix/store\")"),
        (&place("build"), "additional_files[0].path must not be working_dir or above it (got \"build\")"),
        (
            &place("dev/shm/x"),
            "additional_files[0].path must not lie in dev or proc, which belong to the guest's kernel (got \"dev/shm/x\")",
        ),
        (
            &|m| m.scratch_paths.push("proc".into()),
            "scratch_paths[2] must not lie in dev or proc, which belong to the guest's kernel (got \"proc\")",
        ),
        (
            &|m| m.inputs_dir = "dev".into(),
            "inputs_dir must not lie in dev or proc, which belong to the guest's kernel (got \"dev\")",
        ),
        (&place("nix/store/gcc"), &format!("{within} (got \"nix/store/gcc\")")),
        (&place("nix/store/gcc/a/b"), &format!("{within} (got \"nix/store/gcc/a/b\")")),
        (
            &|m| m.additional_files[1].path = "build/.attrs.json".into(),
            "additional_files[1].path must not be a duplicate of additional_files[0].path (got \"build/.attrs.json\")",
        ),
        (
            &|m| m.additional_files = vec![additional("a"); MAX_ADDITIONAL_FILES + 1],
            "additional_files must not have more than 65536 entries (got 65537)",
        ),
    ]);
    let at_the_root = Message { inputs_dir: String::new(), additional_files: vec![additional("gcc/x")], ..full() };
    assert_eq!(refused(at_the_root), format!("{within} (got \"gcc/x\")"));
}

#[test]
fn refscan_needles_are_checked() {
    check(&[
        (&|m| m.refscan_needles[1].clear(), "refscan_needles[1] must not be empty: it would be found everywhere"),
        (
            &|m| m.refscan_needles[2] = "a".repeat(MAX_NEEDLE_BYTES + 1),
            "refscan_needles[2] must not be longer than 4096 bytes (got 4097 bytes)",
        ),
        (
            &|m| m.refscan_needles = vec!["a".into(); MAX_NEEDLES + 1],
            "refscan_needles must not have more than 65536 entries (got 65537)",
        ),
        (
            &|m| m.refscan_needles = (1..400).map(|length| "a".repeat(length)).collect(),
            "refscan_needles must not need more than 4194304 states and matches in a search automaton: give fewer, \
             shorter or more equally long ones (got 10746400)",
        ),
        (
            &|m| {
                m.refscan_needles = vec!["a".into(); MAX_NEEDLES];
                m.outputs = (100..165).map(|output| output.to_string()).collect();
            },
            "refscan_needles times outputs must not be more than 4194304 (got 4259840)",
        ),
    ]);
    // As many as anybody has, of the kind that Nix's clients have.
    let hash = |index: usize| format!("{index:0>32}");
    let outputs = (100..164).map(|output| output.to_string()).collect();
    let most = Message { refscan_needles: (0..MAX_NEEDLES).map(hash).collect(), outputs, ..full() };
    BuildRequest::try_from(most).unwrap();
}

#[test]
fn what_a_guest_is_told_fits_into_one_frame() {
    let sized = |length: usize| Message {
        command_args: strings(&["true"]),
        additional_files: vec![WireFile { path: "f".into(), contents: vec![0; length].into() }],
        ..Message::default()
    };
    let request = BuildRequest::try_from(sized(MAX_SPECIFICATION_BYTES - 64)).unwrap();
    let specification = Specification {
        command_args: request.command_args,
        environment: vec![],
        working_dir: String::new(),
        inputs_dir: String::new(),
        scratch_paths: vec![],
        additional_files: request
            .additional_files
            .into_iter()
            .map(|file| (file.path.to_string(), file.contents.to_vec().into()))
            .collect(),
        outputs: vec![],
        provide_bin_sh: false,
        host_paths: vec![],
        kvm: false,
        processes: u32::MAX,
    };
    let limit = cofferdam_protocol::frame::MAX_FROM_HOST_BYTES;
    FrameWriter::new(std::io::sink(), limit).write(&FromHost::Specification(specification)).unwrap();

    let error = refused(sized(MAX_SPECIFICATION_BYTES));
    assert!(error.starts_with("additional_files with command_args, "), "{error}");
    assert!(error.ends_with("put large files into inputs (got 67107860 bytes)"), "{error}");
}

#[test]
fn an_encoded_request_is_bounded_before_it_is_decoded() {
    let error = validate::check_encoded_bytes(MAX_ENCODED_BYTES + 1).unwrap_err();
    assert_eq!(error.kind, RequestErrorKind::Malformed);
    validate::check_encoded_bytes(MAX_ENCODED_BYTES).unwrap();
}

/// Each list's field key in the binary form, its names in ProtoJSON, the field in errors, and the most entries.
const LISTS: [(u8, [&str; 2], &str, usize); 8] = [
    (0x0a, ["inputs"; 2], "inputs", MAX_INPUTS),
    (0x12, ["commandArgs", "command_args"], "command_args", MAX_ARGS),
    (0x22, ["scratchPaths", "scratch_paths"], "scratch_paths", MAX_SCRATCH_PATHS),
    (0x32, ["outputs"; 2], "outputs", MAX_OUTPUTS),
    (0x3a, ["environmentVars", "environment_vars"], "environment_vars", MAX_ENVIRONMENT_VARS),
    (0x1a, ["availableRoPaths", "available_ro_paths"], "constraints.available_ro_paths", MAX_RO_PATHS),
    (0x4a, ["additionalFiles", "additional_files"], "additional_files", MAX_ADDITIONAL_FILES),
    (0x52, ["refscanNeedles", "refscan_needles"], "refscan_needles", MAX_NEEDLES),
];

/// Entries that can't be decoded tell whether anybody has tried.
#[test]
fn the_entries_of_lists_are_counted_before_they_are_decoded() {
    for (key, names, field, limit) in LISTS {
        let in_constraints = field.starts_with("constraints.");
        let binary = |count: usize| {
            let entry = [key, 1, 0xff];
            let entry = if in_constraints { [[0x42, 3].as_slice(), &entry].concat() } else { entry.to_vec() };
            BuildRequest::from_binary(&entry.repeat(count)).unwrap_err()
        };
        let json = |name: &str, count: usize| {
            let list = format!(r#"{{"{name}":[{}]}}"#, vec!["7"; count].join(","));
            let json = if in_constraints { format!(r#"{{"constraints":{list}}}"#) } else { list };
            BuildRequest::from_json(&json).unwrap_err()
        };
        let json_name = |count| json(names[0], count);
        let proto_name = |count| json(names[1], count);
        for refused in [&binary as &dyn Fn(usize) -> RequestError, &json_name, &proto_name] {
            assert_eq!(refused(limit).kind, RequestErrorKind::Malformed, "{field}");
            let expected = format!("{field} must not have more than {limit} entries (got {})", limit + 1);
            assert_eq!(refused(limit + 1).to_string(), expected);
        }
    }
    BuildRequest::from_json(r#"{"commandArgs":["a"],"inputs":null,"constraints":null}"#).unwrap();
}

#[test]
fn proto_json_is_canonical() {
    let json = r#"{"inputs":[{"file":{"name":"YQ==","digest":"AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=","size":"3","executable":true}}],"commandArgs":["a"],"workingDir":"build","environmentVars":[{"key":"K","value":"/g=="}],"constraints":{"system":"x86_64-linux","minMemory":"1152921504606846976","provideBinSh":true}}"#;
    let request = BuildRequest::from_json(json).unwrap();
    assert_eq!(request.to_json(), json);
    let snake = json.replace("commandArgs", "command_args").replace("\"1152921504606846976\"", "1152921504606846976");
    assert_eq!(BuildRequest::from_json(&snake).unwrap(), request);

    let result = BuildResult {
        outputs: vec![BuildOutput {
            node: Node::Directory { digest: [1; 32].into(), size: 7 },
            needles: [2, 0].into(),
        }],
    };
    let json = r#"{"outputs":[{"output":{"directory":{"digest":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","size":"7"}},"needles":["0","2"]}]}"#;
    assert_eq!(result.to_json(), json);
}

#[test]
fn what_is_no_request_is_refused_as_malformed() {
    for (json, expected) in [
        ("", "EOF"),
        ("[]", "expected"),
        (r#"{"commandArgs":["a"]} x"#, "trailing characters"),
        (r#"{"commandArgs":["a"],"comandArgs":[]}"#, "comandArgs"),
        (r#"{"commandArgs":["a"],"constraints":{"systen":"x"}}"#, "systen"),
        (r#"{"commandArgs":"a"}"#, "expected"),
        (r#"{"commandArgs":["a"],"environmentVars":[{"key":"K","value":"*"}]}"#, "base64"),
    ] {
        let error = BuildRequest::from_json(json).unwrap_err();
        assert_eq!(error.kind, RequestErrorKind::Malformed, "{json}: {error}");
        assert!(error.to_string().contains(expected), "{json}: {error}");
    }
    let error = BuildRequest::from_binary(b"\xff").unwrap_err();
    assert_eq!(error.kind, RequestErrorKind::Malformed);
    assert_eq!(BuildRequest::from_json("{}").unwrap_err().field, "command_args");
}

#[test]
fn what_a_parser_repeats_stays_one_short_line() {
    let hostile = r"x\nerror: forged\u001b[2J\u202e".repeat(1000);
    for json in [format!(r#"{{"{hostile}":1}}"#), format!(r#"{{"outputs":"{hostile}"}}"#)] {
        let error = BuildRequest::from_json(&json).unwrap_err().to_string();
        assert!(error.len() < 1000 && !error.contains(char::is_control) && !error.contains('\u{202e}'), "{error}");
        assert!(error.contains("at line 1 column"), "{error}");
    }
}

/// Whoever changes these changes every request's identity.
#[test]
fn digests_stay_as_they_are() {
    let digest = |message: Message| BuildRequest::try_from(message).unwrap().digest().to_string();
    let smallest = Message { command_args: strings(&["true"]), ..Message::default() };
    assert_eq!(digest(smallest.clone()), "blake3-hLQHZbxLaZ60/6nzOrigdqKDGmMAR0Eu6Y+WbWAdlzA=");
    assert_eq!(digest(full()), "blake3-4RlS5JTFvLaUHfFNV7P7NWK5/sucesXvubobpuwF6fA=");
    let plain = B3Digest::of(&smallest.encode_to_vec()).to_string();
    assert_ne!(digest(smallest), plain);
}

fn any_name() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 1..12).prop_map(|name| {
        name.into_iter().map(|byte| if matches!(byte, 0 | b'/' | b'.') { b'_' } else { byte }).collect()
    })
}

fn any_paths() -> impl Strategy<Value = Vec<String>> {
    proptest::collection::btree_set("x[a-zä -]{0,7}(/[a-z.]{3,5}x){0,2}", 0..5)
        .prop_map(|set| set.into_iter().collect())
}

prop_compose! {
    fn any_request()(
        inputs in proptest::collection::btree_map(any_name(), (0..3_u8, any::<[u8; 32]>(), any::<u64>(), any::<bool>()), 0..5),
        command_args in proptest::collection::vec("[^\0]{1,10}", 1..5),
        scratch_paths in any_paths(),
        outputs in any_paths(),
        ro_paths in any_paths(),
        additional in any_paths(),
        vars in proptest::collection::btree_map("[^\0=]{1,9}", proptest::collection::vec(1..=u8::MAX, 0..9), 0..5),
        constraints in proptest::option::of((any::<u64>(), any::<bool>(), any::<bool>())),
        refscan_needles in proptest::collection::vec(".{1,9}", 0..5),
    ) -> Message {
        let input = |(name, (kind, digest, size, executable)): (Vec<u8>, (u8, [u8; 32], u64, bool))| {
            let (name, digest) = (Bytes::from(name), Bytes::copy_from_slice(&digest));
            let entry = match kind {
                0 => entry::Entry::Directory(DirectoryEntry { name, digest, size }),
                1 => entry::Entry::File(FileEntry { name, digest, size, executable }),
                _ => entry::Entry::Symlink(SymlinkEntry { target: name.clone(), name }),
            };
            Entry { entry: Some(entry) }
        };
        Message {
            inputs: inputs.into_iter().map(input).collect(),
            command_args,
            working_dir: "0".into(),
            scratch_paths,
            inputs_dir: "1".into(),
            outputs,
            environment_vars: vars.iter().map(|(key, value)| var(key, value)).collect(),
            constraints: constraints.map(|(min_memory, network_access, provide_bin_sh)| WireConstraints {
                system: SYSTEM.into(),
                min_memory,
                available_ro_paths: ro_paths.iter().map(|path| format!("/{path}")).collect(),
                network_access,
                provide_bin_sh,
            }),
            additional_files: additional.iter().map(|path| self::additional(path)).collect(),
            refscan_needles,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_form_says_the_same(message in any_request()) {
        let request = BuildRequest::try_from(message.clone()).unwrap();
        prop_assert_eq!(&request.to_proto(), &message);
        let binary = BuildRequest::from_binary(&message.encode_to_vec()).unwrap();
        let json = BuildRequest::from_json(&request.to_json()).unwrap();
        prop_assert_eq!(binary.digest(), request.digest());
        prop_assert_eq!(json.digest(), request.digest());
        prop_assert_eq!(&binary, &request);
        prop_assert_eq!(&json, &request);
    }

    #[test]
    fn any_bytes_are_taken_or_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = BuildRequest::from_binary(&bytes);
        let _ = BuildRequest::from_json(&String::from_utf8_lossy(&bytes));
    }
}
