//! Spans for OpenTelemetry: one for each build, as a child of the client's span if there is one, and one for each phase.

use std::{collections::BTreeSet, time::Duration};

use opentelemetry::{
    Context, KeyValue, StringValue, Value,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{Span as _, SpanKind, Status, TraceContextExt as _, Tracer as _, TracerProvider as _},
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{SdkTracer, SdkTracerProvider},
};
use tonic::metadata::MetadataMap;

use crate::{
    network::Connection,
    records::{Outcome, Record},
};

/// How long sending the last spans may take when the daemon ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// The name of a build's span. Those of its phases are their words.
const BUILD: &str = "build";

/// Most servers in an attribute.
const MAX_SERVERS: usize = 32;

/// Sends spans to a collector, from a thread of its own. Nothing waits for it; excess spans are dropped.
pub(crate) struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// Sends to a collector by OTLP over gRPC, such as `http://localhost:4317`. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// The address is invalid.
    pub(crate) fn to(endpoint: &str) -> Result<Self, ExporterBuildError> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build()?;
        let resource = Resource::builder().with_service_name("cofferdam").build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Self { tracer: provider.tracer("cofferdam"), provider })
    }

    /// Sends the spans of a build that has ended. `context` is the client's.
    pub(crate) fn ended(&self, record: &Record, context: &Context) {
        let (created, ended) = (record.created, record.created + record.ended.unwrap_or_default());
        let span = self.tracer.span_builder(BUILD).with_kind(SpanKind::Server).with_start_time(created);
        let mut span = span.with_attributes(attributes(record)).start_with_context(&self.tracer, context);
        match &record.outcome {
            Some(Outcome::Failed(failure)) => span.set_status(Status::error(failure.chain())),
            Some(Outcome::Built(_)) => span.set_status(Status::Ok),
            None => {}
        }
        let within = context.with_remote_span_context(span.span_context().clone());
        for (phase, spent) in record.spans() {
            let child = self.tracer.span_builder(phase.word()).with_start_time(created + spent.start);
            child.start_with_context(&self.tracer, &within).end_with_timestamp(created + spent.end);
        }
        span.end_with_timestamp(ended);
    }
}

/// What there is to say of a build.
fn attributes(record: &Record) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("cofferdam.build.id", record.id.to_string()),
        KeyValue::new("cofferdam.request.digest", record.request_digest.to_string()),
        KeyValue::new("cofferdam.client", record.client.clone()),
    ];
    if let Some(Outcome::Failed(failure)) = &record.outcome {
        attributes.push(KeyValue::new("cofferdam.failure.kind", failure.kind.word()));
        attributes.push(KeyValue::new("cofferdam.failure.reason", failure.reason.clone()));
    }
    attributes.extend(network(record));
    attributes
}

/// What there is to say of its connections.
fn network(record: &Record) -> Vec<KeyValue> {
    let (connections, more) = (&record.connections, record.more_connections);
    if connections.is_empty() {
        return Vec::new();
    }
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let sum = |bytes: fn(&Connection) -> u64| number(connections.iter().map(bytes).fold(0, u64::saturating_add));
    let (denied, others): (Vec<_>, Vec<_>) = connections.iter().partition(|one| one.verdict.denied().is_some());
    let servers = |connections: &[&Connection]| {
        let servers: BTreeSet<String> = connections.iter().map(|connection| connection.server()).collect();
        Value::Array(servers.into_iter().take(MAX_SERVERS).map(StringValue::from).collect::<Vec<_>>().into())
    };
    vec![
        KeyValue::new("cofferdam.network.connections", number(connections.len() as u64 + more)),
        KeyValue::new("cofferdam.network.sent", sum(|connection| connection.sent)),
        KeyValue::new("cofferdam.network.received", sum(|connection| connection.received)),
        KeyValue::new("cofferdam.network.servers", servers(&others)),
        KeyValue::new("cofferdam.network.denied", servers(&denied)),
    ]
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!(%error, "the last traces can't be sent");
        }
    }
}

/// The trace in a request's `traceparent`.
pub(crate) fn context(metadata: &MetadataMap) -> Context {
    struct Metadata<'a>(&'a MetadataMap);
    impl Extractor for Metadata<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            self.0.get(key)?.to_str().ok()
        }

        fn keys(&self) -> Vec<&str> {
            Vec::new()
        }
    }
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Metadata(metadata))
}

#[cfg(test)]
mod tests {
    use cofferdam_castore::B3Digest;

    use super::*;
    use crate::{
        build::{Phase, failure::Failure},
        records::{End, Records, Request, Retention},
        request::OutputOrder,
    };

    /// The record of a build that has all that a span can tell.
    fn eventful() -> Record {
        let (directory, digest) = (tempfile::tempdir().unwrap(), B3Digest::of(b"request"));
        let records = Records::open(directory.path(), Retention::default()).unwrap();
        let recording = records.begin(Request {
            digest,
            environment: digest,
            key: digest,
            client: "user:1000".into(),
            description: "true".into(),
            output_order: OutputOrder::default(),
            output_paths: Vec::new(),
            log_bytes: 0,
            secrets: Vec::new(),
        });
        recording.connection(&Connection::default());
        let outcome = Outcome::Failed(Failure::executor("vmm", "it died"));
        recording.finish(End { outcome, usage: None, kept: None }).unwrap()
    }

    #[test]
    fn documents_name_all_attributes_and_spans_and_no_others() {
        let attributes = attributes(&eventful());
        let attributes: BTreeSet<_> = attributes.iter().map(|attribute| attribute.key.as_str()).collect();
        let phases = [
            Phase::Queued,
            Phase::Resolving,
            Phase::Booting,
            Phase::Running,
            Phase::Ingesting,
            Phase::Keeping,
            Phase::Shell,
        ];
        let spans: BTreeSet<_> = phases.map(Phase::word).into_iter().chain([BUILD]).collect();
        let section = |document: &'static str| {
            let (_, traces) = document.split_once("\n## Traces\n").unwrap();
            traces.split("\n## ").next().unwrap()
        };
        let reference = section(include_str!("../../../docs/daemon.md"));
        let example = section(include_str!("../../../docs/operating.md"));
        let collector = include_str!("../../../docs/monitoring/collector.yml");
        let named = |text: &'static str| -> BTreeSet<&str> {
            let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '_');
            let words = words.map(|word| word.trim_start_matches("span."));
            words.filter(|word| word.starts_with("cofferdam.")).collect()
        };
        assert_eq!(named(reference), attributes);
        for text in [example, collector] {
            let named = named(text);
            assert!(!named.is_empty() && named.is_subset(&attributes), "{named:?}");
        }
        for span in &spans {
            assert!(reference.contains(&format!("`{span}`")), "{span}");
        }
        let asked = example.split("name = \"").skip(1).map(|rest| rest.split('"').next().unwrap());
        let asked: BTreeSet<_> = asked.collect();
        assert!(!asked.is_empty() && asked.is_subset(&spans), "{asked:?}");
        // The kind that the example keeps and asks for.
        let kind = Failure::executor("vmm", "").kind.word();
        assert!(example.contains(&format!("\"{kind}\"")) && collector.contains(&format!("[{kind}]")));
    }

    #[test]
    fn a_traceparent_is_continued_and_nonsense_is_not() {
        let context = |value: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("traceparent", value.parse().unwrap());
            super::context(&metadata).span().span_context().clone()
        };
        let found = context("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        assert_eq!(found.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert!(found.is_remote() && found.is_sampled());
        for nonsense in ["", "00-0-0-01", "ff"] {
            assert!(!context(nonsense).is_valid(), "{nonsense}");
        }
    }
}
