//! The common part of every gRPC service, and of pages for browsers.
//!
//! ```text
//!   Listener ─▶ TLS ─▶ connection ─▶ Guarded ─────────▶ a service ─▶ Work
//!      │                   │            │                              │
//!   handshakes,        one Client    strangers, sizes,         its turn on a thread,
//!   connections                      MemoryBudget              deadlines for its client
//! ```
//!
//! Clients may be hostile. Every message has a limit, every wait an end, and of everything that there is a limited amount
//! of (connections, memory, threads) one [`Client`] has at most its share. What takes time it takes in [`Turns`].

mod children;
mod client;
mod connection;
mod guard;
mod http;
mod listener;
mod memory;
mod pages;
mod places;
pub mod queue;
mod serve;
mod share;
mod tenants;
mod turns;
mod work;

pub use client::Client;
pub use guard::{Guarded, Limits, MAX_QUESTION_BYTES, Refusal, Takes};
pub use http::{HttpBody, HttpOptions, serve_http};
pub use listener::{AnonymousTcp, Listener, Tls, forbid_anonymous_tcp};
pub use memory::{MemoryBudget, MemoryPermit};
pub use pages::{Page, Pages, Visit};
pub use serve::{ServeError, ServeOptions, serve_routes};
pub use tenants::{Clients, Pattern, Patterns};
pub use tonic::{
    service::RoutesBuilder,
    transport::{Certificate, Identity},
};
pub use turns::{Line, Turn, Turns};
pub use work::{Answers, Inlet, Outlet, Work};

/// Bytes that may be on their way in one stream without having been asked for by a reader.
pub const STREAM_WINDOW_BYTES: u32 = 512 * 1024;
