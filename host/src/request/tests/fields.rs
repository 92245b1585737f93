//! The rules of each field.

use super::*;

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
    // A large but realistic number, of the kind that Nix's clients send.
    let hash = |index: usize| format!("{index:0>32}");
    let outputs = (100..164).map(|output| output.to_string()).collect();
    let most = Message { refscan_needles: (0..MAX_NEEDLES).map(hash).collect(), outputs, ..full() };
    BuildRequest::try_from(most).unwrap();
}

#[test]
fn the_largest_specification_fits_into_one_frame() {
    let sized = |length: usize| Message {
        command_args: strings(&["true"]),
        additional_files: vec![WireFile { path: "f".into(), contents: vec![0; length].into() }],
        ..Message::default()
    };
    let request = BuildRequest::try_from(sized(MAX_SPECIFICATION_BYTES - 64)).unwrap();
    let contents = vec![0; cofferdam_protocol::MAX_SECRET_BYTES].into();
    let secret = Secret { name: "n".repeat(255), contents };
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
        network: false,
        host_paths: vec![],
        kvm: false,
        processes: u32::MAX,
        user_namespaces: true,
        ca_file: Some(vec![0; cofferdam_protocol::MAX_CA_FILE_BYTES].into()),
        secrets: vec![secret; cofferdam_protocol::MAX_SECRETS],
        unix_time_ns: u64::MAX,
        terminal: None,
    };
    let limit = cofferdam_protocol::frame::MAX_FROM_HOST_BYTES;
    FrameWriter::new(std::io::sink(), limit).write(&FromHost::Specification(specification)).unwrap();

    let error = refused(sized(MAX_SPECIFICATION_BYTES));
    assert!(error.starts_with("additional_files with command_args, "), "{error}");
    let got = MAX_SPECIFICATION_BYTES + 20;
    assert!(error.ends_with(&format!("put large files into inputs (got {got} bytes)")), "{error}");
}
