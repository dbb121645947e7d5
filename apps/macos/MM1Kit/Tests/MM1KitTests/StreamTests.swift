import Foundation
import Testing

@testable import MM1Kit

private let text = #"{"choices": [{"delta": {"content": "red"}, "finish_reason": null}]}"#
private let end = #"{"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": null}"#
private let usage = """
    {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10, \
    "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 4}}, "timings": \
    {"ttft_seconds": 0.5, "total_seconds": 1, "tokens_per_second": 2}}
    """

/// A stream of these events, as if a server had sent them.
private func sent(_ events: String..., status: Int = 200) -> AnswerStream {
    AnswerStream {
        Transfer { continuation in
            continuation.yield(.head(Head(status: status)))
            for event in events { continuation.yield(.bytes(Data("data: \(event)\n\n".utf8))) }
            continuation.finish()
        }
    }
}

private func failure(of stream: AnswerStream) async throws -> MM1Error {
    try await thrown(MM1Error.self) { for try await _ in stream {} }
}

@Test func theLastPieceSaysHowItEnded() async throws {
    var pieces: [Piece] = []
    for try await piece in sent(text, end, usage, "[DONE]", text) { pieces.append(piece) }
    #expect(pieces.map(\.text) == ["red", ""])
    let finish = try #require(pieces.last?.finish)
    #expect(finish.reason == .stop)
    #expect(finish.usage.promptTokens == 9)
    #expect(finish.usage.promptTokensDetails.imageTokens == 4)
    #expect(finish.timings.ttftSeconds == 0.5)
}

@Test func aStreamThatEndsEarlyIsNoAnswer() async throws {
    guard case .interrupted = try await failure(of: sent(text, end, usage)) else {
        Issue.record("expected .interrupted")
        return
    }
}

@Test func aFaultWithinAStreamIsTold() async throws {
    let fault = #"{"error": {"message": "out of room", "code": "internal", "param": null}}"#
    guard case .refused(let refusal) = try await failure(of: sent(text, fault, "[DONE]")) else {
        Issue.record("expected .refused")
        return
    }
    #expect(refusal.message == "out of room")
}

@Test(arguments: ["not JSON", "[]", #"{"choices": [{}]}"#])
func whatIsNoChunkIsTold(event: String) async throws {
    guard case .malformed = try await failure(of: sent(event, "[DONE]")) else {
        Issue.record("expected .malformed")
        return
    }
}

@Test func anEndWithoutItsReasonIsTold() async throws {
    guard case .malformed = try await failure(of: sent(text, usage, "[DONE]")) else {
        Issue.record("expected .malformed")
        return
    }
}

@Test func nobodyListens() async throws {
    // Of TCP's reserved ports: nothing is there.
    let client = MM1Client(url: URL(string: "http://127.0.0.1:1")!, timeout: 30)
    await #expect(throws: MM1Error.self) { try await client.health() }
    guard case .unreachable = try await failure(of: client.stream([.user("Hello")])) else {
        Issue.record("expected .unreachable")
        return
    }
}

@Test func aSilentServerIsGivenUp() async throws {
    let listener = try Listener()
    let client = MM1Client(url: listener.url, timeout: 0.5)
    let began = ContinuousClock.now
    await #expect(throws: MM1Error.self) { try await client.health() }
    guard case .unreachable = try await failure(of: client.stream([.user("Hello")])) else {
        Issue.record("expected .unreachable")
        return
    }
    // URLSession's own is a minute each.
    #expect(ContinuousClock.now - began < .seconds(50))
}
