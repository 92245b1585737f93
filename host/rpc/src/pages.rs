//! Pages for browsers, on the same listeners as services: with their places, timeouts and TLS.

use std::{
    convert::Infallible,
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body_util::BodyExt as _;
use tonic::{
    Extensions, Status,
    body::Body,
    codegen::{
        Service,
        http::{Request, Response},
    },
    service::Routes,
    transport::server::TlsConnectInfo,
};

use crate::{Client, connection::ConnectionInfo};

/// Pages that one connection may ask for at a time.
pub(crate) const MAX_CONNECTION_PAGES: u32 = 16;

/// An answer.
pub type Page = Response<Body>;

/// Who asks for a page, as far as the connection shows it.
#[derive(Debug, Clone)]
pub struct Visit {
    /// Where the visitor is.
    pub address: Client,
    /// The holder of the certificate that the visitor has shown.
    pub certificate: Option<Client>,
    /// Whether nobody between can read along.
    pub is_encrypted: bool,
}

impl Visit {
    fn of(connection: &Extensions) -> Result<Self, Status> {
        let address = ConnectionInfo::of(connection).map(|info| info.client.clone());
        let address = address.ok_or_else(|| Status::unauthenticated("this connection does not identify its client"))?;
        let tls = connection.get::<TlsConnectInfo<ConnectionInfo>>();
        let has_certificate = tls.and_then(TlsConnectInfo::peer_certs).is_some();
        let certificate = has_certificate.then(|| Client::from_connection(connection)).transpose()?;
        Ok(Self { address, certificate, is_encrypted: tls.is_some() })
    }
}

type Answer = dyn Fn(Visit, Request<Body>) -> BoxFuture<'static, Page> + Send + Sync;

/// What answers browsers.
#[derive(Clone)]
pub struct Pages(Arc<Answer>);

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pages")
    }
}

impl Pages {
    /// Pages that are answered by this.
    pub fn new(answer: impl Fn(Visit, Request<Body>) -> BoxFuture<'static, Page> + Send + Sync + 'static) -> Self {
        Self(Arc::new(answer))
    }

    pub(crate) fn into_routes(self) -> Routes {
        Routes::from(Routes::default().into_axum_router().fallback_service(self))
    }
}

impl<B> Service<Request<B>> for Pages
where
    B: hyper::body::Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    type Response = Page;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Page, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let connection = ConnectionInfo::of(request.extensions());
        let in_progress = connection.map(|info| info.activity.begin());
        let answered = match Visit::of(request.extensions()) {
            Ok(visit) => {
                if let (Some(connection), Some(client)) = (connection, &visit.certificate) {
                    connection.is_of(client);
                }
                Ok(self.0(visit, request.map(Body::new)))
            }
            Err(status) => Err(refused(&status)),
        };
        Box::pin(async move {
            let page = match answered {
                Ok(page) => page.await,
                Err(page) => page,
            };
            // Until the answer's end.
            let until_then = move |frame| {
                let _in_progress = &in_progress;
                frame
            };
            Ok(page.map(|body| Body::new(body.map_frame(until_then))))
        })
    }
}

fn refused(status: &Status) -> Page {
    let mut page = Response::new(Body::new(http_body_util::Full::from(format!("{}\n", status.message()))));
    *page.status_mut() = tonic::codegen::http::StatusCode::UNAUTHORIZED;
    page
}
