import Foundation
import Testing

@testable import MM1Kit

/// One real server for all tests of a client: one answer at a time, and one that may wait.
private actor Shared {
    static let only = Shared()

    private let server: MM1Server

    init() {
        var chosen = options()
        chosen.arguments += ["--parallel", "1", "--max-waiting", "1"]
        server = MM1Server(chosen)
    }

    func client() async throws -> MM1Client {
        try await server.start()
    }
}

@Suite(.serialized) struct ClientTests {
    let client: MM1Client

    init() async throws {
        client = try await Shared.only.client()
    }

    @Test func anAnswerIsStreamed() async throws {
        let question = [Message.user("Describe the picture.", [try picture("four-shapes")])]
        let greedy = AnswerOptions(temperature: 0)
        var pieces: [Piece] = []
        for try await piece in client.stream(question, options: greedy) { pieces.append(piece) }
        #expect(pieces.count > 3)
        #expect(pieces.dropLast().allSatisfy { $0.finish == nil && !$0.text.isEmpty })
        let finish = try #require(pieces.last?.finish)
        #expect(finish.reason == .stop)
        #expect(finish.usage.promptTokensDetails.imageTokens > 0)
        #expect(finish.usage.completionTokens >= pieces.count - 1)
        let whole = try await client.answer(question, options: greedy)
        #expect(whole.text == pieces.map(\.text).joined())
        #expect(whole.text.contains("star") || whole.text.contains("circle"))
    }

    @Test func twoPicturesAreBothSeen() async throws {
        let (star, four) = (try picture("red-star"), try picture("four-shapes"))
        let greedy = AnswerOptions(temperature: 0)
        // Each is answered by another of the two, and the last by both in their order.
        let heart = Message.user("What colour is the heart?", [star, four])
        let two = try await client.answer([heart], options: greedy)
        #expect(two.text.contains("purple"))
        let asked = "Which picture shows a red star: first, second, both or neither?"
        for (pictures, place) in [([star, four], "first"), ([four, star], "second")] {
            let which = Message.user(asked, pictures)
            #expect(try await client.answer([which], options: greedy).text == place)
        }
        let one = try await client.answer([.user("What is this?", [star])], options: greedy)
        let tokens = [one, two].map(\.finish.usage.promptTokensDetails.imageTokens)
        #expect(tokens[0] > 0)
        #expect(tokens[1] == 2 * tokens[0])
    }

    @Test func theLongestAnswerIsKeptTo() async throws {
        var three = endless
        three.maxTokens = 3
        let answer = try await client.answer([.user("Hello")], options: three)
        #expect(answer.finish.reason == .length)
        #expect(answer.finish.usage.completionTokens == 3)
    }

    @Test(arguments: ["cancelled", "left"])
    func anAnswerThatNobodyReadsIsStopped(how: String) async throws {
        let left = #"mm1_requests_total{path="/v1/chat/completions",status="499"}"#
        let before = try await metric(left, client)
        let generated = #"mm1_tokens_total{kind="generated"}"#
        let tokens = try await metric(generated, client)
        let question = [Message.user("Describe it.", [try picture("red-star")])]
        if how == "left" {
            for try await _ in client.stream(question, options: endless) { break }
        } else {
            let (client, started) = (client, AsyncStream.makeStream(of: Void.self))
            let reading = Task {
                for try await _ in client.stream(question, options: endless) {
                    started.continuation.yield()
                }
            }
            for await _ in started.stream { break }
            #expect(try await metric("mm1_answers_running", client) == 1)
            reading.cancel()
            await #expect(throws: CancellationError.self) { try await reading.value }
        }
        try await eventually("the server stops") {
            try await metric("mm1_answers_running", client) == 0
        }
        try await eventually("it notes who left") {
            try await metric(left, client) == before + 1
        }
        // Of answers that came to their end alone.
        #expect(try await metric(generated, client) == tokens)
    }

    @Test func manyThatLeaveAtOnceLeaveNothingBehind() async throws {
        let client = client
        for _ in 0..<20 {
            let reading = Task {
                for try await _ in client.stream([.user("Hello")], options: endless) {}
            }
            try await Task.sleep(for: .milliseconds(.random(in: 0...20)))
            reading.cancel()
            let result = await reading.result
            // Cancelled, or refused behind one that has not quite left.
            #expect(throws: (any Error).self) { try result.get() }
        }
        try await eventually("the server stops") {
            let running = try await metric("mm1_answers_running", client)
            return try await running + metric("mm1_questions_waiting", client) == 0
        }
        #expect(try await client.answer([.user("Hello")]).finish.reason == .stop)
    }

    @Test func aFullServerSaysWhenToComeAgain() async throws {
        let client = client
        let question = [Message.user("Describe it.", [try picture("red-star")])]
        let busy = (0..<2).map { _ in
            Task { for try await _ in client.stream(question, options: endless) {} }
        }
        defer { busy.forEach { $0.cancel() } }
        try await eventually("one runs and one waits") {
            let running = try await metric("mm1_answers_running", client)
            return try await running + metric("mm1_questions_waiting", client) == 2
        }
        let refusal = try await refusal(of: {
            try await client.answer(question)
        })
        #expect(refusal.status == 429)
        #expect(refusal.code == "queue_full")
        #expect(try #require(refusal.retryAfter) >= 1)
    }

    @Test func aWrongKeyIsRefused() async throws {
        for key in [nil, "not-the-key-of-this-server"] {
            let stranger = MM1Client(url: client.url, key: key)
            let asks: [@Sendable () async throws -> Void] = [
                { _ = try await stranger.models() },
                { _ = try await stranger.answer([.user("Hello")]) },
            ]
            for ask in asks {
                let refusal = try await refusal(of: ask)
                #expect(refusal.status == 401)
                #expect(refusal.code == "invalid_api_key")
                #expect(refusal.requestID != nil)
            }
            // Whether it is well is no secret.
            #expect(try await stranger.health().status == .ok)
        }
    }

    @Test func whatIsNoPictureIsRefused() async throws {
        let noise = Picture(Data("not a picture".utf8))
        let refusal = try await refusal(of: {
            try await client.answer([.user("What is this?", [noise])])
        })
        #expect(refusal.status == 400)
        #expect(!refusal.message.contains("\n"))
    }

    @Test func theModelSaysWhatItCan() async throws {
        let health = try await client.health()
        #expect(health == Health(status: .ok, model: "mm1-tiny", loaded: true))
        let model = try #require(await client.models().first)
        #expect(model.id == "mm1-tiny")
        #expect(model.mm1.answers)
        #expect(try #require(model.mm1.context) >= 1024)
        #expect(model.mm1.resolution != nil)
    }

    @MainActor @Test func aConversationRemembersItselfAndCanBeStopped() async throws {
        let client = client
        let session = ChatSession(options: AnswerOptions(temperature: 0)) { client }
        await session.ask("What colour is the star?", [try picture("red-star")])?.value
        await session.ask("And its shape?")?.value
        #expect(session.problem == nil)
        #expect(session.turns.map(\.message.role) == [.user, .assistant, .user, .assistant])
        #expect(session.turns[1].text.contains("red"))
        #expect(session.turns.map(\.pictures.count) == [1, 0, 0, 0])
        let finish = try #require(session.turns[3].finish)
        #expect(finish.usage.promptTokensDetails.imageTokens > 0)

        session.options = endless
        let task = try #require(session.ask("Describe it."))
        #expect(session.isAnswering)
        #expect(session.ask("Once more") == nil)
        try await eventually("it begins") { session.turns.last?.text.isEmpty == false }
        session.stop()
        await task.value
        #expect(!session.isAnswering)
        #expect(session.problem == nil)
        #expect(session.turns.count == 6)
        #expect(session.turns[5].finish == nil)
        await session.clear()
        #expect(session.turns.isEmpty)
    }

    @MainActor @Test func aConversationTellsWhatWentWrong() async throws {
        let stranger = MM1Client(url: client.url, key: "not-the-key-of-this-server")
        let session = ChatSession { stranger }
        await session.ask("Hello")?.value
        #expect(try #require(session.problem).contains("API key"))
        #expect(session.turns.map(\.message.role) == [.user])
        #expect(!session.isAnswering)
    }

    @MainActor @Test func aQuestionThatWasRefusedFailsNoLaterOne() async throws {
        let client = client
        let session = ChatSession(options: AnswerOptions(temperature: 0)) { client }
        await session.ask("What is this?", [Picture(Data("no picture".utf8))])?.value
        #expect(session.problem != nil)
        await session.ask("What colour is the star?", [try picture("red-star")])?.value
        #expect(session.problem == nil)
        #expect(session.turns.map(\.message.role) == [.user, .user, .assistant])
        #expect(session.turns[2].text.contains("red"))
    }
}
