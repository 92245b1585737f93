//! Answers of a daemon with the result of an earlier build.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
};

use cofferdam_proto::cofferdam::v1::{
    BuildRequest, GetRequest, build_service_client::BuildServiceClient, done::Outcome, event::Event,
};
use cofferdam_tests::{
    Cofferdam, Daemon, image,
    request::{encoded, shell},
};

/// Submits the usual request. Returns whether an earlier result answered it, and the digest of that result's environment.
async fn build(daemon: &Daemon) -> (bool, Vec<u8>) {
    let mut client = BuildServiceClient::new(daemon.peer().raw_channel());
    let request =
        BuildRequest { request: Some(encoded(shell("echo made > out", &["build/out"]))), ..Default::default() };
    let mut events = client.build(request).await.expect("it is accepted").into_inner();
    let mut accepted = None;
    while let Some(event) = events.message().await.expect("the stream goes on") {
        match event.event {
            Some(Event::Accepted(event)) => accepted = Some(event),
            Some(Event::Done(done)) => {
                assert!(matches!(done.outcome, Some(Outcome::Success(_))), "{done:?}");
                let accepted = accepted.expect("it comes first");
                let build = client.get(GetRequest { id: accepted.id }).await.expect("it is ours").into_inner();
                return (accepted.from_record, build.environment_digest.to_vec());
            }
            _ => {}
        }
    }
    panic!("the stream has ended");
}

fn copy(from: &Path, to: &Path) {
    for name in ["kernel", "initramfs", "scratch.ext4"] {
        fs::copy(from.join(name), to.join(name)).expect("the image can be copied");
    }
}

/// The same daemon on the same state: unchanged, with more configuration, with another image, and as at first.
#[tokio::test]
async fn a_changed_environment_runs_an_equal_request_again() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    copy(image().0, directory.path());
    let cofferdam = Cofferdam::with_image(directory.path());
    let shown = format!("[host_paths]\n\"/opt/data\" = {:?}", directory.path());
    let mut environments = Vec::new();
    for config in ["", &shown] {
        let daemon = Daemon::start(&cofferdam, config);
        let (is_from_record, environment) = build(&daemon).await;
        assert!(!is_from_record, "{config}");
        assert_eq!(build(&daemon).await, (true, environment.clone()), "{config}");
        environments.push(environment);
        daemon.end().succeeds();
    }
    let daemon = Daemon::start(&cofferdam, "");
    assert_eq!(build(&daemon).await, (true, environments[0].clone()));
    daemon.end().succeeds();
    let initramfs = directory.path().join("initramfs");
    let appended = File::options().append(true).open(initramfs).and_then(|mut file| file.write_all(&[0; 512]));
    appended.expect("the image can be written");
    let daemon = Daemon::start(&cofferdam, "");
    let (is_from_record, environment) = build(&daemon).await;
    assert!(!is_from_record && !environments.contains(&environment));
    daemon.end().succeeds();
}
