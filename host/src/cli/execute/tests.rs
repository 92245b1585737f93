use cofferdam_castore::B3Digest;
use cofferdam_proto::snix::build::v1 as proto;

use super::*;
use crate::request::BuildOutput;

fn request(outputs: &[&str], needles: &[&str]) -> BuildRequest {
    let strings = |items: &[&str]| items.iter().map(ToString::to_string).collect();
    let message = proto::BuildRequest {
        command_args: strings(&["true"]),
        outputs: strings(outputs),
        refscan_needles: strings(needles),
        ..proto::BuildRequest::default()
    };
    message.try_into().unwrap()
}

#[test]
fn each_output_is_one_line_in_the_order_of_the_request() {
    let node = Node::File { digest: B3Digest::of(b""), size: 0, executable: false };
    let output = |needles: &[u64]| BuildOutput { node: node.clone(), needles: needles.iter().copied().collect() };
    let text = node_text::format(&node);
    let result = BuildResult { outputs: vec![output(&[]), output(&[2, 0])] };
    let without = lines(&request(&["a", "b\nc"], &[]), &result);
    assert_eq!(without, format!("a\t{text}\n\"b\\nc\"\t{text}\n"));
    let with = lines(&request(&["a", "b"], &["x", "y", "z z"]), &result);
    assert_eq!(with, format!("a\t{text}\t\nb\t{text}\tx \"z z\"\n"));
}

#[test]
fn an_output_within_another_is_written_with_it() {
    let request = request(&["a", "a/b", "ab", "c/d"], &[]);
    let dests: Vec<_> = exports(Path::new("/out"), &request.outputs).collect();
    assert_eq!(dests, [(0, "/out/a".into()), (2, "/out/ab".into()), (3, "/out/c/d".into())]);
}

#[tokio::test]
async fn an_unwritable_output_is_named_and_earlier_ones_stay() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("b"), "a directory is wanted here").unwrap();
    let node = Node::Symlink { target: "t".try_into().unwrap() };
    let output = BuildOutput { node, needles: [].into() };
    let result = BuildResult { outputs: vec![output; 4] };
    let request = request(&["a", "b/out", "c", "d"], &[]);
    let written =
        write_outputs((&Store::memory(), &out), Existing::Refused, &request, &result, &CancellationToken::new()).await;
    let error = written.unwrap_err();
    assert_eq!(error.exit().code(), 2);
    assert!(error.to_string().contains("\"b/out\" can't be written"), "{error}");
    let CliError::Wrong { advice: Some(advice), .. } = error else { panic!("{error:?}") };
    let command = format!("cofferdam export link:t {}/b/out, and likewise", out.display());
    assert!(advice.starts_with(&command) && advice.ends_with("(2)"), "{advice}");
    assert_eq!(fs::read_link(out.join("a")).unwrap(), Path::new("t"));
    assert!(!out.join("c").exists());
}

#[test]
fn nothing_is_written_over() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(refuse_existing(directory.path()).unwrap_err().exit().code(), 2);
    refuse_existing(&directory.path().join("new/deeper")).unwrap();
}
