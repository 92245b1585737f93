//! What is between the routes and a service: tvix's names, and the end of a request that was broken off.

use std::task::{Context, Poll};

use http_body_util::BodyExt as _;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{Service, http::Request},
    server::NamedService,
};

use super::super::Package;

/// The service under snix's name.
#[derive(Debug, Clone)]
pub(in super::super) struct Snix<S>(pub(in super::super) S);

impl<S: NamedService> NamedService for Snix<S> {
    const NAME: &'static str = S::NAME;
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Snix<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> S::Future {
        // To tonic, a stream that its client has cancelled is at its end: half a blob would become one.
        let broken_off = |status: Status| match status.code() {
            Code::Cancelled => Status::aborted("the client has broken the request off"),
            _ => status,
        };
        self.0.call(request.map(|body| Body::new(body.map_err(broken_off))))
    }
}

macro_rules! tvix {
    ($type:ident, $name:literal) => {
        #[doc = concat!("The service as ", $name)]
        #[derive(Debug, Clone)]
        pub(in super::super) struct $type<S>(pub(in super::super) Snix<S>);

        impl<S> NamedService for $type<S> {
            const NAME: &'static str = $name;
        }

        impl<S: Service<Request<Body>>> Service<Request<Body>> for $type<S> {
            type Response = S::Response;
            type Error = S::Error;
            type Future = S::Future;

            fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
                self.0.poll_ready(context)
            }

            fn call(&mut self, mut request: Request<Body>) -> S::Future {
                Package::Tvix.readdress(&mut request, Package::Snix);
                self.0.call(request)
            }
        }
    };
}

tvix!(TvixBlobs, "tvix.castore.v1.BlobService");
tvix!(TvixDirectories, "tvix.castore.v1.DirectoryService");
