//! Targets for the host's decoders of bytes from clients, guests and helper processes.

use std::{path::Path, sync::LazyLock};

use cofferdam::{
    fuzzing::{self, Receiver},
    request::BuildRequest,
};
use cofferdam_castore::{Store, refscan::ReferencePattern, verify::verify_node};
use cofferdam_proto::{EncodedRequest, cofferdam::v1 as ours, snix::build::v1 as proto};
use cofferdam_protocol::{
    End, FromGuest, FromHost, Report, SetupFailure, Specification, Step, UnsupportedKind, Usage, VERSION,
    frame::{FrameReader, FrameWriter},
    tree::{Event, Limits},
};
use prost::Message as _;
use serde::Serialize;
use serde_json::json;
use tokio::runtime::{Builder, Runtime};

/// Bytes of the largest frame.
const FRAME_BYTES: usize = 4096;

const LIMITS: Limits = Limits { entries: 1_000, bytes: 1 << 20 };

pub(crate) static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().build().expect("there are resources for a runtime"));

static NEEDLES: LazyLock<ReferencePattern> =
    LazyLock::new(|| ReferencePattern::new(["needle"]).expect("one needle fits"));

/// An accepted request survives binary and JSON.
pub fn request(bytes: &[u8]) -> bool {
    let Ok(request) = BuildRequest::from_binary(bytes) else { return false };
    let again = request.to_proto().encode_to_vec();
    assert_eq!(BuildRequest::from_binary(&again).as_ref(), Ok(&request));
    assert_eq!(BuildRequest::from_json(&request.to_json()).as_ref(), Ok(&request), "JSON must say the same");
    true
}

fn seed() -> String {
    let file = json!({ "name": "aW5wdXQ=", "digest": "rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI=" });
    let request = json!({
        "inputs": [{ "file": file }],
        "commandArgs": ["/bin/sh", "-c", "true"],
        "workingDir": "build",
        "scratchPaths": ["build", "nix/store"],
        "inputsDir": "nix/store",
        "outputs": ["nix/store/out"],
        "environmentVars": [{ "key": "A", "value": "Yg==" }],
        "constraints": { "system": "x86_64-linux", "minMemory": "7", "provideBinSh": true, "availableRoPaths": ["/a"] },
        "additionalFiles": [{ "path": "build/x", "contents": "eA==" }],
        "refscanNeedles": ["needle"],
    });
    request.to_string()
}

pub(crate) fn request_seeds() -> Vec<Vec<u8>> {
    let request = BuildRequest::from_json(&seed()).expect("the seed is right");
    vec![request.to_proto().encode_to_vec()]
}

/// An accepted request in JSON survives JSON and binary.
pub fn json_request(bytes: &[u8]) -> bool {
    let Ok(Ok(request)) = std::str::from_utf8(bytes).map(BuildRequest::from_json) else { return false };
    assert_eq!(BuildRequest::from_json(&request.to_json()).as_ref(), Ok(&request));
    let binary = request.to_proto().encode_to_vec();
    assert!(proto::BuildRequest::decode(&*binary).is_ok_and(|message| BuildRequest::try_from(message) == Ok(request)));
    true
}

pub(crate) fn json_request_seeds() -> Vec<Vec<u8>> {
    vec![seed().into_bytes(), br#"{"command_args":["x"],"constraints":{"system":"x86_64-linux"}}"#.to_vec()]
}

/// The message around a request, which is decoded later. A decoded message survives encoding.
pub fn build_message(bytes: &[u8]) -> bool {
    let Ok(message) = ours::BuildRequest::decode(bytes) else { return false };
    assert_eq!(ours::BuildRequest::decode(&*message.encode_to_vec()).as_ref(), Ok(&message));
    message.request.is_some_and(|request| BuildRequest::from_binary(request.as_bytes()).is_ok())
}

pub(crate) fn build_message_seeds() -> Vec<Vec<u8>> {
    let request = EncodedRequest::from(&BuildRequest::from_json(&seed()).expect("the seed is right"));
    let limits = ours::Limits { memory_bytes: 1 << 30, cpus: 2, ..Default::default() };
    let message =
        ours::BuildRequest { request: Some(request), limits: Some(limits), detached: true, ..Default::default() };
    vec![message.encode_to_vec()]
}

/// An accepted request of the input device encodes to the same bytes.
pub fn input_request(bytes: &[u8]) -> bool {
    let Some(again) = fuzzing::input_request(bytes) else { return false };
    assert_eq!(again, bytes);
    true
}

pub(crate) fn input_request_seeds() -> Vec<Vec<u8>> {
    vec![vec![0], [&[1][..], &[7; 32]].concat(), [&[2][..], &[7; 64]].concat()]
}

/// The event stream of a VMM. Later events don't change the first cause of the machine's end.
pub fn vmm_events(bytes: &[u8]) -> bool {
    let cause = RUNTIME.block_on(fuzzing::vmm_events(bytes));
    let more = [bytes, b"\n\n{\"source\":\"guest\",\"event\":\"panic\"}\n\n"].concat();
    assert!(cause.is_none() || RUNTIME.block_on(fuzzing::vmm_events(&*more)) == cause);
    cause.is_some()
}

pub(crate) fn vmm_events_seeds() -> Vec<Vec<u8>> {
    let event = |source: &str, event: &str| format!("{}\n\n", json!({ "source": source, "event": event }));
    let reset = event("vmm", "starting") + &event("vm", "rebooting");
    vec![reset.into_bytes(), event("guest", "panic").into_bytes()]
}

/// Text for a terminal. The result has no control characters, and doesn't depend on how the bytes are split.
pub fn plain_text(bytes: &[u8]) -> bool {
    let shown = fuzzing::plain_text([bytes]);
    assert!(!shown.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\t')), "{shown:?}");
    assert_eq!(fuzzing::plain_text(bytes.chunks(1)), shown);
    !shown.is_empty()
}

pub(crate) fn plain_text_seeds() -> Vec<Vec<u8>> {
    vec![b"\x1b[31mred\x1b[0m 10%\r20%\r\n".to_vec(), "gr\u{fc}n \u{1f980} \u{202e}back\x1b]0;title\x07".into()]
}

/// A log for a browser. The result has no markup but coloured spans, and its text doesn't depend on how the bytes are split.
pub fn log_as_html(bytes: &[u8]) -> bool {
    let text = |html: String| {
        let mut text = String::new();
        let mut rest = html.as_str();
        while let Some((before, tag)) = rest.split_once('<') {
            let (tag, after) = tag.split_once('>').expect("elements are closed");
            let class = tag.strip_prefix("span class=\"").and_then(|class| class.strip_suffix('"'));
            let is_plain = |class: &str| class.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b' ');
            assert!(tag == "/span" || class.is_some_and(is_plain), "{tag}");
            text.push_str(before);
            rest = after;
        }
        text + rest
    };
    let shown = text(fuzzing::log_as_html([bytes]));
    assert!(
        !shown.contains(|c: char| "<>\"'".contains(c) || (c.is_control() && !matches!(c, '\n' | '\t'))),
        "{shown:?}"
    );
    assert_eq!(text(fuzzing::log_as_html(bytes.chunks(1))), shown);
    !shown.is_empty()
}

pub(crate) fn log_as_html_seeds() -> Vec<Vec<u8>> {
    let link = b"\x1b]8;;javascript:alert(1)\x1b\\<a>\x1b]8;;\x1b\\\r";
    vec![b"\x1b[1;38;5;208m\"&\x1b[48:2::1:2:3m'\x1b[0m 10%\r20%\r\n".to_vec(), link.to_vec()]
}

/// Messages of host and guest. An accepted message survives encoding.
pub fn guest_frames(bytes: &[u8]) -> bool {
    let (mut reader, mut taken) = (FrameReader::new(bytes, FRAME_BYTES), 0);
    while let Ok(message) = reader.read::<FromGuest<'_>>() {
        let wire = framed(&[&message]);
        let again = FrameReader::new(&*wire, FRAME_BYTES).read::<FromGuest<'_>>().is_ok_and(|again| again == message);
        assert!(again, "{message:?}");
        taken += 1;
    }
    let mut reader = FrameReader::new(bytes, FRAME_BYTES);
    while let Ok(message) = reader.read::<FromHost>() {
        let wire = framed(&[&message]);
        assert!(FrameReader::new(&*wire, FRAME_BYTES).read::<FromHost>().is_ok_and(|again| again == message));
        taken += 1;
    }
    taken > 0
}

fn framed<M: Serialize>(messages: &[&M]) -> Vec<u8> {
    let mut frames = Vec::new();
    let mut writer = FrameWriter::new(&mut frames, FRAME_BYTES);
    for message in messages {
        writer.write(message).expect("seeds are small, and what was read is no larger when it is written");
    }
    frames
}

pub(crate) fn guest_frames_seeds() -> Vec<Vec<u8>> {
    let report = Report {
        end: End::Exited(0),
        out_of_memory: false,
        scratch_full: true,
        too_many_processes: Some(7),
        usage: Usage::default(),
    };
    let failure = SetupFailure { step: Step::Places, detail: "it is there" };
    let guest = framed(&[
        &FromGuest::Hello { version: cofferdam_protocol::VERSION, uptime_us: 1_000_000 },
        &FromGuest::Log(b"text"),
        &FromGuest::Exited(report),
        &FromGuest::Missing { below_working_dir: false },
        &FromGuest::Unsupported { path: b"fifo", kind: UnsupportedKind::Fifo },
        &FromGuest::Finished,
    ]);
    let specification = Specification {
        command_args: vec!["/bin/sh".to_owned()],
        environment: vec![("A".to_owned(), b"b".to_vec().into())],
        working_dir: "build".to_owned(),
        inputs_dir: "nix/store".to_owned(),
        scratch_paths: vec!["build".to_owned()],
        additional_files: vec![("build/x".to_owned(), b"x".to_vec().into())],
        outputs: vec!["nix/store/out".to_owned()],
        provide_bin_sh: true,
        host_paths: Vec::new(),
        network: false,
        kvm: false,
        processes: 100,
        user_namespaces: false,
        ca_file: None,
        secrets: Vec::new(),
        unix_time_ns: 0,
        terminal: None,
    };
    let host = framed(&[&FromHost::Specification(specification), &FromHost::Acknowledge]);
    vec![guest, host, framed(&[&FromGuest::SetupFailed(failure)])]
}

/// Outputs as a guest sends them. Accepted ones are complete in the store.
pub fn guest_tree(bytes: &[u8]) -> bool {
    let store = Store::memory();
    let mut receiver = Receiver::new(&store, RUNTIME.handle().clone(), &NEEDLES, LIMITS);
    let mut reader = FrameReader::new(bytes, FRAME_BYTES);
    let mut outputs = Vec::new();
    while let Ok(event) = reader.read::<Event<'_>>() {
        match receiver.take(&event) {
            Ok(output) => outputs.extend(output),
            Err(_) => return false,
        }
    }
    if outputs.is_empty() {
        return false;
    }
    receiver.commit().expect("memory has room");
    for output in outputs {
        verify_node(&store, &output.node, Path::new("output"), &|| false).expect("what was taken is whole");
    }
    true
}

pub(crate) fn guest_tree_seeds() -> Vec<Vec<u8>> {
    let tree = framed(&[
        &Event::Directory { name: b"" },
        &Event::Directory { name: b"d" },
        &Event::File { name: b"f", executable: true },
        &Event::Data(b"contents"),
        &Event::Data(b" with a needle"),
        &Event::End,
        &Event::End,
        &Event::Symlink { name: b"l", target: b"d/f" },
        &Event::End,
    ]);
    let file = framed(&[&Event::File { name: b"", executable: false }, &Event::End]);
    vec![tree, file, framed(&[&Event::Symlink { name: b"", target: b"t" }])]
}

/// A guest's whole side of the conversation. Accepted ones come to the end of a build.
pub fn conversation(bytes: &[u8]) -> bool {
    fuzzing::conversation(RUNTIME.handle(), bytes)
}

pub(crate) fn conversation_seeds() -> Vec<Vec<u8>> {
    let hello = FromGuest::Hello { version: VERSION, uptime_us: 1 };
    let exited = |code| {
        FromGuest::Exited(Report {
            end: End::Exited(code),
            out_of_memory: false,
            scratch_full: false,
            too_many_processes: None,
            usage: Usage::default(),
        })
    };
    let log = FromGuest::Log(b"log");
    let built = framed(&[
        &hello,
        &log,
        &exited(0),
        &FromGuest::Tree(Event::Directory { name: b"" }),
        &FromGuest::Tree(Event::File { name: b"f", executable: true }),
        &FromGuest::Tree(Event::Data(b"a needle")),
        &FromGuest::Tree(Event::End),
        &FromGuest::Tree(Event::End),
        &FromGuest::Tree(Event::Symlink { name: b"", target: b"/target" }),
        &FromGuest::Finished,
    ]);
    let failed = framed(&[&hello, &log, &exited(3)]);
    vec![
        built,
        failed,
        framed(&[
            &hello,
            &exited(0),
            &FromGuest::Missing { below_working_dir: false },
            &FromGuest::Missing { below_working_dir: false },
            &FromGuest::Finished,
        ]),
    ]
}

/// An index, a manifest, or a registry's challenge.
pub fn image_document(bytes: &[u8]) -> bool {
    fuzzing::image_document(bytes)
}

pub(crate) fn image_document_seeds() -> Vec<Vec<u8>> {
    let digest = format!("sha256:{}", "0".repeat(64));
    let platform = json!({ "os": "linux", "architecture": "amd64" });
    let entry = json!({ "digest": digest, "size": 3, "platform": platform });
    let config = json!({ "digest": digest, "size": 3, "mediaType": "application/vnd.oci.image.config.v1+json" });
    let manifest = json!({ "config": config, "layers": [config], "os": "linux", "architecture": "amd64" });
    vec![
        json!({ "manifests": [entry] }).to_string().into_bytes(),
        manifest.to_string().into_bytes(),
        b"Bearer realm=\"https://a.example/token\",service=\"s\"".to_vec(),
    ]
}
