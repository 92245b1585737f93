//! Requests in their encodings, and their digests.

use super::*;

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

/// Entries that can't be decoded show whether they were decoded before they were counted.
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
fn bytes_that_are_no_request_are_malformed() {
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

/// A change of these digests changes the identity of every request.
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
