//! Serves the services of snix under tvix's names, too.

use std::task::{Context, Poll};

use tonic::{
    body::Body,
    codegen::{Service, http::Request},
    server::NamedService,
};

use super::super::Package;

macro_rules! tvix {
    ($type:ident, $name:literal) => {
        #[doc = concat!("The service as ", $name)]
        #[derive(Debug, Clone)]
        pub(in super::super) struct $type<S>(pub(in super::super) S);

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
