//! A span, put together.

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, Status};

use super::ids::{SpanId, TraceId};

/// An attribute.
pub(super) fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

/// A span that is being put together.
pub(crate) struct Draft(Span);

impl Draft {
    /// Of that name, in that trace.
    pub(crate) fn new(
        name: impl Into<String>,
        trace: TraceId,
        id: SpanId,
        parent: Option<SpanId>,
    ) -> Self {
        Self(Span {
            trace_id: trace,
            span_id: id,
            parent_span_id: parent.unwrap_or_default(),
            name: name.into(),
            kind: SpanKind::Internal.into(),
            ..Span::default()
        })
    }

    /// From when to when, nanoseconds since the Unix epoch. One that ends before it begins, by a clock that was set
    /// meanwhile, is as long as nothing.
    pub(crate) fn over(mut self, from: u64, to: u64) -> Self {
        self.0.start_time_unix_nano = from;
        self.0.end_time_unix_nano = to.max(from);
        self
    }

    /// With what is known in words.
    pub(crate) fn text(self, key: &str, value: impl Into<String>) -> Self {
        self.with(key, Some(Value::StringValue(value.into())))
    }

    /// The same, if it is known.
    pub(crate) fn maybe_text(self, key: &str, value: Option<&str>) -> Self {
        self.with(key, value.map(|value| Value::StringValue(value.to_owned())))
    }

    /// With a number, if it is known. Those that no attribute can hold are as large as one can.
    pub(crate) fn number(self, key: &str, value: Option<impl TryInto<i64>>) -> Self {
        let value = value.map(|value| value.try_into().unwrap_or(i64::MAX));
        self.with(key, value.map(Value::IntValue))
    }

    /// With what is so or is not.
    pub(crate) fn flag(self, key: &str, value: bool) -> Self {
        self.with(key, Some(Value::BoolValue(value)))
    }

    fn with(mut self, key: &str, value: Option<Value>) -> Self {
        let value = value.map(|value| attribute(&format!("stillpoint.{key}"), value));
        self.0.attributes.extend(value);
        self
    }

    /// It failed, for that reason, if there is one.
    pub(crate) fn failed(mut self, why: Option<&str>) -> Self {
        if let Some(why) = why {
            self.0.status = Some(Status {
                message: why.to_owned(),
                code: StatusCode::Error.into(),
            });
        }
        self
    }

    pub(crate) fn done(self) -> Span {
        self.0
    }
}
