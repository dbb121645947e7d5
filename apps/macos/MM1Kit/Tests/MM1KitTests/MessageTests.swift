import Foundation
import Testing

@testable import MM1Kit

private func fields(_ question: Question) throws -> NSDictionary {
    let data = try JSONEncoder().encode(question)
    return try #require(JSONSerialization.jsonObject(with: data) as? NSDictionary)
}

@Test func aQuestionIsWhatTheServerReads() throws {
    let picture = Picture(Data([1, 2, 3]), detail: .high)
    let question = Question(
        messages: [.system("Be brief."), .user("What?", [picture]), .assistant("A star.")],
        options: AnswerOptions(
            maxTokens: 7, temperature: 0, topP: 0.5, seed: 3, stop: ["\n"], presencePenalty: 1,
            frequencyPenalty: -1, logitBias: [2: -100]))
    let expected: NSDictionary = [
        "messages": [
            ["role": "system", "content": [["type": "text", "text": "Be brief."]]],
            [
                "role": "user",
                "content": [
                    [
                        "type": "image_url",
                        "image_url": ["url": "data:image/*;base64,AQID", "detail": "high"],
                    ],
                    ["type": "text", "text": "What?"],
                ],
            ],
            ["role": "assistant", "content": [["type": "text", "text": "A star."]]],
        ],
        "stream": true,
        "stream_options": ["include_usage": true],
        "max_completion_tokens": 7, "temperature": 0, "top_p": 0.5, "seed": 3, "stop": ["\n"],
        "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": ["2": -100],
    ]
    #expect(try fields(question) == expected)
}

@Test func whatIsNotSetIsLeftToTheServer() throws {
    let question = Question(messages: [.user("What?")], options: AnswerOptions())
    let names = try Set(fields(question).allKeys.compactMap { $0 as? String })
    #expect(names == ["messages", "stream", "stream_options"])
}

@Test func aRefusalIsWhatTheServerSays() {
    let body = Data(
        #"{"error": {"message": "no room", "type": "x", "param": "n", "code": "queue_full"}}"#.utf8)
    let head = Head(status: 429, fields: ["retry-after": "3", "X-Request-ID": "req_1"])
    let refusal = Refusal(head, body: body)
    #expect(
        refusal
            == Refusal(
                status: 429, message: "no room", code: "queue_full", param: "n", retryAfter: 3,
                requestID: "req_1"))
    #expect(MM1Error.refused(refusal).localizedDescription == "no room")
}

@Test(arguments: ["", "<html>", "{}", #"{"error": "text"}"#])
func aRefusalThatIsNoneOfTheServersHasItsStatus(body: String) {
    let refusal = Refusal(Head(status: 502), body: Data(body.utf8))
    #expect(refusal.message == "HTTP status 502")
    #expect(refusal.retryAfter == nil)
}
