//! Builds whose clients know what they must make.

use anyhow::{Result, bail};
use cofferdam_castore::{
    B3Digest,
    grpc::{Peer, PeerOptions},
    proto::entry::Entry as Node,
};
use cofferdam_proto::{
    EncodedRequest,
    cofferdam::v1::{self as ours, build_service_client::BuildServiceClient, done::Outcome, event::Event},
};
use cofferdam_tests::request::{encoded, shell};
use tonic::{Status, Streaming, transport::Channel};

/// A build that is watched, over a connection of its own.
pub(crate) struct Watched {
    pub(crate) id: String,
    pub(crate) client: BuildServiceClient<Channel>,
    events: Streaming<ours::Event>,
}

impl Watched {
    pub(crate) async fn start(addr: &str, text: &str) -> Result<Self, Status> {
        let peer = Peer::from_addr(addr, &PeerOptions::default()).expect("the daemon's address is right");
        Self::over(peer.raw_channel(), request(text)).await
    }

    /// Submits a request.
    pub(crate) async fn over(channel: Channel, request: EncodedRequest) -> Result<Self, Status> {
        let mut client = BuildServiceClient::new(channel);
        let request = ours::BuildRequest { request: Some(request), ..Default::default() };
        let mut events = client.build(request).await?.into_inner();
        match events.message().await?.and_then(|event| event.event) {
            Some(Event::Accepted(accepted)) => Ok(Self { id: accepted.id, client, events }),
            event => panic!("the first event is {event:?}"),
        }
    }

    /// Waits for so many events, or for the last one, which has the outcome.
    pub(crate) async fn events(&mut self, count: u8) -> Result<Option<Outcome>, Status> {
        for _ in 0..count {
            match self.events.message().await? {
                Some(ours::Event { event: Some(Event::Done(done)) }) => return Ok(done.outcome),
                Some(_) => {}
                None => return Err(Status::unavailable("the events end before the build")),
            }
        }
        Ok(None)
    }

    pub(crate) async fn outcome(&mut self) -> Result<Outcome, Status> {
        while let Some(event) = self.events.message().await? {
            if let Some(Event::Done(done)) = event.event {
                return done.outcome.ok_or_else(|| Status::internal("the end tells no outcome"));
            }
        }
        Err(Status::unavailable("the events end before the build"))
    }
}

/// A request for a file with this text.
pub(crate) fn request(text: &str) -> EncodedRequest {
    encoded(shell(&format!("echo {text} | tee out"), &["build/out"]))
}

/// Checks that the outcome is the expected file.
pub(crate) fn check(outcome: &Outcome, text: &str) -> Result<()> {
    let contents = format!("{text}\n");
    let expected = B3Digest::of(contents.as_bytes());
    if let Outcome::Success(success) = outcome
        && let Some(response) = &success.response
        && let [output] = &response.outputs[..]
        && let Some(Node::File(file)) = output.output.as_ref().and_then(|node| node.entry.as_ref())
        && file.digest == expected.as_slice()
        && file.size == contents.len() as u64
    {
        return Ok(());
    }
    bail!("this is not the file {contents:?}: {outcome:?}")
}
