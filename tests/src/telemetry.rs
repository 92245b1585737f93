//! What scrapes a daemon's metrics, and what collects its traces.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpListener, TcpStream},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, async_trait, transport::server::TcpIncoming};

/// The metrics at the address that a daemon has printed.
pub fn scrape(addr: &str) -> io::Result<String> {
    let (host, path) = addr.trim_start_matches("http://").split_once('/').unwrap_or((addr, ""));
    let mut connection = TcpStream::connect(host)?;
    write!(connection, "GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    Ok(answer)
}

/// Collects spans.
#[derive(Debug)]
pub struct Collector {
    /// Its address, for a daemon's configuration.
    pub endpoint: String,
    spans: mpsc::Receiver<Vec<Span>>,
}

impl Collector {
    /// Starts one on the caller's runtime.
    pub fn start(listener: TcpListener) -> Self {
        let (sender, spans) = mpsc::channel(16);
        let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
        listener.set_nonblocking(true).expect("it is a socket");
        let listener = tokio::net::TcpListener::from_std(listener).expect("a runtime is there");
        let service = TraceServiceServer::new(Service(sender));
        let served = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(served.serve_with_incoming(TcpIncoming::from(listener)));
        Self { endpoint, spans }
    }

    /// The spans that have come.
    pub fn spans(&mut self) -> Vec<Span> {
        std::iter::from_fn(|| self.spans.try_recv().ok()).flatten().collect()
    }
}

struct Service(mpsc::Sender<Vec<Span>>);

#[async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let scopes = request.into_inner().resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
        self.0.send(scopes.flat_map(|scope| scope.spans).collect()).await.expect("the test takes them");
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
